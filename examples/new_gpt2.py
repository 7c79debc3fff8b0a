"""A new small GPT-2 for a corpus of your own: its tokenizer trained, its weights random. Needs no hub.

Usage: python examples/new_gpt2.py CORPUS OUT [--vocab_size 8000] [--n_layer 4] [--n_embd 256] [--n_head 4] ...
CORPUS is a text file, or a folder with train.txt, as in `mpoe finetune --corpus`. OUT becomes a folder in Transformers'
format; `mpoe finetune` trains it as it trains `gpt2` from the hub. The commands for that are printed at the end.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

END = "<|endoftext|>"


def main(args: argparse.Namespace) -> None:
    """Write the model and its tokenizer, print what comes next."""
    corpus = Path(args.corpus)
    text = corpus / "train.txt" if corpus.is_dir() else corpus  # never a validation or test part
    if not text.is_file():
        raise SystemExit(f"error: CORPUS must be a text file, or a folder with train.txt; got {corpus}")
    tokenizer = train_tokenizer(text, args.vocab_size, args.n_positions)
    end = tokenizer.backend_tokenizer.token_to_id(END)
    config = GPT2Config(
        vocab_size=len(tokenizer),  # a small corpus has fewer pairs to merge than asked for
        n_positions=args.n_positions,
        n_embd=args.n_embd,
        n_layer=args.n_layer,
        n_head=args.n_head,
        bos_token_id=end,
        eos_token_id=end,
    )
    set_seed(args.seed)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens")
    train = f"mpoe finetune --objective causal-lm --corpus {corpus}"
    print("pre-train it dense, then fine-tune it as a mixture:")
    print(
        f"  {train} --model_name_or_path {args.out} --mpo_layers nompo --num_experts 1 --learning_rate 1e-3 "
        "--output_dir runs/dense"
    )
    print(f"  {train} --model_name_or_path runs/dense --num_experts 8 --output_dir runs/mpoe")


def train_tokenizer(text: Path, vocab_size: int, n_positions: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, GPT-2's own: every text can be written in it, and is read back as it was."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(text)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, unk_token=END, model_max_length=n_positions
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("out")
    for name, default in {
        "vocab_size": 8000, "n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 256, "seed": 42,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    main(parser.parse_args())
