"""A tiny random model of every family, and batches with padding for it."""

import torch
import transformers

from tiny import V1_0, V1_1, tiny_t5

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZES, **TOKENS, "max_position_embeddings": 64}
LLAMA = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64, **TOKENS}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64,
    **TOKENS, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "pooler_hidden_size": 32}
T5 = {
    "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
    "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 64}
GEMMA_3 = {
    "text_config": LLAMA,
    "vision_config": {**SIZES, "image_size": 8, "patch_size": 4},
    "mm_tokens_per_image": 4,
    **TOKENS,
}
DROPOUTS = (
    "hidden_dropout_prob attention_probs_dropout_prob attention_dropout hidden_dropout dropout activation_dropout "
    "resid_pdrop embd_pdrop attn_pdrop seq_classif_dropout pooler_dropout classifier_dropout"
).split()

# class prefix, class suffix, config
_MODELS = {
    "mt5": ("MT5", "ForConditionalGeneration", T5),
    "gpt2": ("GPT2", "LMHeadModel", GPT),
    "bert": ("Bert", "ForSequenceClassification", SIZES),
    "roberta": ("Roberta", "ForSequenceClassification", {**SIZES, "max_position_embeddings": 66}),
    "xlm-roberta": ("XLMRoberta", "ForSequenceClassification", {**SIZES, "max_position_embeddings": 66}),
    "electra": ("Electra", "ForSequenceClassification", {**SIZES, "embedding_size": 16}),
    "deberta-v2": ("DebertaV2", "ForSequenceClassification", {**SIZES, **DEBERTA}),
    "distilbert": ("DistilBert", "ForSequenceClassification", DISTILBERT),
    "bart": ("Bart", "ForConditionalGeneration", BART),
    "mbart": ("MBart", "ForConditionalGeneration", BART),
    "opt": ("OPT", "ForCausalLM", {**DECODER, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", DECODER),
    "gptj": ("GPTJ", "ForCausalLM", {**GPT, "rotary_dim": 4}),
    "llama": ("Llama", "ForCausalLM", LLAMA),
    "mistral": ("Mistral", "ForCausalLM", LLAMA),
    "qwen2": ("Qwen2", "ForCausalLM", LLAMA),
    "qwen3": ("Qwen3", "ForCausalLM", LLAMA),
    "gemma2": ("Gemma2", "ForCausalLM", LLAMA),
    "gemma3_text": ("Gemma3", "ForCausalLM", LLAMA),
    "gemma3": ("Gemma3", "ForConditionalGeneration", GEMMA_3),
    "phi3": ("Phi3", "ForCausalLM", LLAMA),
    "vit": ("ViT", "ForImageClassification", {**SIZES, "image_size": 8, "patch_size": 4}),
}  # fmt: skip
FAMILY_NAMES = ["t5-v1.0", "t5-v1.1", *_MODELS]
TEXT = [name for name in FAMILY_NAMES if name != "vit"]
ENCODERS = ["bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "distilbert", "vit"]
GENERATIVE = [name for name in FAMILY_NAMES if name not in ENCODERS]
ENCODER_DECODERS = ["t5-v1.0", "t5-v1.1", "mt5", "bart", "mbart"]


def tiny_model(name, **options):
    """A model in evaluation mode, without dropout, with biases that are not 0."""
    if name.startswith("t5"):
        return tiny_t5({"t5-v1.0": V1_0, "t5-v1.1": V1_1}[name], **options)
    prefix, suffix, sizes = _MODELS[name]
    config_class = getattr(transformers, prefix + ("TextConfig" if name == "gemma3_text" else "Config"))
    config = config_class(**{**dict.fromkeys(DROPOUTS, 0.0), **sizes, **options})
    model = getattr(transformers, prefix + suffix)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 or parameter_name.endswith("bias"):  # larger than at the start of a training
                parameter.normal_(std=0.2)
    if model.can_generate():
        model.generation_config.eos_token_id = None  # or a short text proves little
    return model


def family_batch(name, rows=3, length=9):
    """Inputs and labels, the first row padded at its end."""
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8), "labels": torch.randint(2, (rows,))}
    input_ids = torch.randint(3, 64, (rows, length))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, -3:] = 0
    input_ids[0, -3:] = 0
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if name in ENCODERS:
        return {**batch, "labels": torch.randint(2, (rows,))}
    if name == "gemma3":
        batch["token_type_ids"] = torch.zeros_like(input_ids)  # text, no image
    if name not in ENCODER_DECODERS:
        return {**batch, "labels": input_ids.masked_fill(input_ids == 0, -100)}
    labels = torch.randint(3, 64, (rows, 5))
    labels[:, -1] = 2 if "bart" in name else 1  # the end
    return {**batch, "labels": labels}
