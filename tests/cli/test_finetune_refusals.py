"""What `mpoe finetune` refuses: one line, exit status 2, and nothing is written."""

from pathlib import Path

import pytest
import torch

import mpoe
from mpoe.cli import finetune
from mpoe.cli.main import main
from mpoe.training.arguments import FinetuneTrainingArguments
from tiny import FLAGS, assert_refused, tiny_t5, tiny_tokenizer

# Two experts and a dozen tokens: one of them goes hungry.
pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")
QUICK = [*FLAGS, "--max_steps", "2", "--save_strategy", "no"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "colour"], "task 'colour' is not known"),
        (["--data_dir", "nowhere"], "data_dir must be a folder; nowhere"),
        (["--num_experts", "0"], "num_experts must be an integer >= 1; got 0"),
        (["--num_experts", "two"], "argument --num_experts: invalid int value: 'two'"),
        (["--mpo_layers", "ffn"], "mpo_layers must be nompo or a comma list of word_embed, mlp, attention; got 'ffn'"),
        (["--mpo_layers", "mlp,nompo"], "mpo_layers must be nompo alone"),
        (["--layout=balanced", "--site_dims", '{"64x32": [[4, 4, 8], [2, 4, 4]]}'], "must equal output_features = 64"),
        (["--linear_trunc", "30"], "linear_trunc must be 30000 with layout extended, which truncates nothing; got 30"),
        (["--mpo_layers", "mlp,attention"], "need layout='balanced'"),
        (["--capacity_factor", "1.25"], "capacity_factor must be left out with layout 'extended', got 1.25"),
        (["--balancing", "auction"], "argument --balancing: invalid choice: 'auction'"),
        (["--balancing_step", "0"], "balancing_step must be > 0; got 0"),
        (["--expert_rank", "1000000000000"], "expert_rank must be at most 1,048,576; got 1000000000000"),
        (["--expert_rank", "0"], "expert_rank must be an integer >= 1; got 0"),
        (["--expert_activation", "tanh"], "argument --expert_activation: invalid choice: 'tanh'"),
        (["--output_lr_ratio", "0"], "output_lr_ratio must be > 0; got 0"),
        (["--output_lr_ratio", "4", "--layout", "balanced"], "output_lr_ratio is for layout 'extended'"),
        (["--site_dims", "[1]"], "site_dims must be a JSON object"),
        (["--site_dims", "{"], "site_dims must be a JSON object"),
        (["--feed_forward", '{"path": "layers.*.mlp"}'], "feed_forward must have the keys"),
        (["--layers", "one"], "layers must be a comma list of integers; got 'one'"),
        (["--layers", "9"], "layers must be among the model's 0..1; got [9]"),
        (["--model_name_or_path", "data"], "must be a folder with a config.json; data has none"),
        (["--model_name_or_path", "no/such-model"], "no/such-model must be a folder with a config.json"),
        (["--max_source_length", "0"], "max_source_length must be >= 1; got 0"),
        (["--expert_noize", "1"], "unknown flag --expert_noize: did you mean --expert_noise? mpoe finetune --help"),
        (["--output_dir", "model"], "holds other files and no run.json"),
        (["--tasks", "cola", "cola"], "tasks must name every task once; got cola, cola"),
        (
            ["--tasks", "cola", "sentiment", "--train_sampling_strategy", "group_by_length"],
            "leave train_sampling_strat",
        ),
        (["--temperature", "0"], "temperature must be > 0; got 0.0"),
        (["--n_val", "0"], "n_val must be >= 1, or -1 for all; got 0"),
        (["--load_layer", "mlp"], "needs --load_experiment"),
        (["--load_experiment", "model"], "names no quant_method 'mpoe'"),
        (["--update_mpo_layer", "ffn"], "update_mpo_layer must be noupdate or a comma list"),
        (["--train_AT_index", "1"], "must name auxiliary sites, of [0, 2]; got [1]"),
        (["--gradient_mask_prob", "2"], "gradient_mask_prob must be in [0, 1]; got 2.0"),
        (["--gradient_mask_prob", "0.5", "--mpo_layers", "nompo"], "gradient_mask_prob is about the central tensors"),
        (["--gradient_mask_prob", "0.5", "--update_mpo_layer", "noupdate"], "needs a central tensor that trains"),
        (["--gradient_mask_prob", "0.5", "--tensor_learn"], "which tensor_learn freezes; leave one of them out"),
        (["--second_policy_train", "random"], "second_policy_train must be left out with layout 'extended'"),
        (
            ["--layout", "balanced", "--second_policy_train", "random"],
            "second_policy_train must be 'all' where a token has one expert",
        ),
        (["--mpo_lr", "0"], "mpo_lr must be > 0; got 0.0"),
        (["--mpo_lr", "1e-4", "--mpo_layers", "nompo"], "are about MPOs; the model has none"),
        (["--auxiliary_weight_decay", "-1"], "auxiliary_weight_decay must be >= 0; got -1.0"),
        (["--test_routing", "--moe_type", "none"], "test_routing shuffles what routers decide; this model has none"),
        (["--routing", "sequence", "--stacks", "decoder"], "a decoder's tokens must not see those after them"),
        (["--share_central", "false", "--mpo_layers", "nompo"], "share_central must be True, or False for a mixture"),
        (["--share_central", "false"], "share_central must be left out with layout 'extended', got False"),
        (["--tensor_learn", "--moe_type", "none", "--mpo_layers", "nompo"], "the model has none"),
        (["--freeze_model", "--update_mpo_layer", "noupdate"], "something must be left to train"),
        (["--moe_type", "top2"], "invalid choice: 'top2'"),
        (["--top_k", "3"], "top_k must be at most num_experts = 2; got 3"),
        (["--capacity_factor", "0"], "capacity_factor must be > 0"),
        (["--second_policy_train", "often"], "invalid choice: 'often'"),
        (["--resume_from_checkpoint", "run/checkpoint-2"], "resume_from_checkpoint must be left out"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(ground, capsys, flags, message):
    assert_refused(["finetune", *FLAGS, *flags], message, ground, capsys)


def test_processes_that_find_no_accelerator_do_not_train_one_by_one(ground, capsys, monkeypatch):
    """With torchrun, without a GPU and without --use_cpu each would take itself for the only one."""
    # once Accelerate, which has one process for the whole session, has looked
    monkeypatch.setattr(finetune, "check_flags", lambda *_: monkeypatch.setenv("WORLD_SIZE", "2"))
    assert_refused(["finetune", *FLAGS], "2 processes were started", ground, capsys)


def test_a_package_that_a_flag_needs_is_named(ground, capsys, monkeypatch):
    def needs(self):
        raise ImportError("No package metadata was found for deepspeed>=0.9.3")

    monkeypatch.setattr(FinetuneTrainingArguments, "__post_init__", needs)
    assert_refused(["finetune", *FLAGS], "need a package that is not installed: No package metadata", ground, capsys)


def test_flags_against_what_a_mixture_is_are_refused(ground, capsys):
    finetune.run([*QUICK, "--output_dir", "first"])
    capsys.readouterr()
    again = ["finetune", *QUICK, "--model_name_or_path", "first"]
    for flags, message in (
        (["--num_experts", "4"], "stays what it is (num_experts: 2 there, 4 now)"),
        (["--moe_type", "switch"], "stays what it is (moe_type: moe there, switch now)"),
        (["--layout", "balanced"], "stays what it is (layout: extended there, balanced now)"),
        (["--balancing", "loss"], "stays what it is (balancing: bias there, loss now)"),
        (["--expert_rank", "4"], "stays what it is (expert_rank: 8 there, 4 now)"),
        (["--moe_type", "none", "--mpo_layers", "nompo"], "must be dense to be trained as a dense one"),
    ):
        assert_refused([*again, *flags], message, ground, capsys)
    assert main([*again, "--learning_rate", "0.01", "--moe_type", "moe", "--expert_rank", "8"]) == 0
    capsys.readouterr()
    other = ["finetune", *QUICK, "--load_experiment", "first", "--moe_type", "switch", "--output_dir", "other"]
    assert_refused(other, "must be one of these flags (top_k: 2 there, 1 now)", ground, capsys)


def test_flags_that_say_a_default_are_refused_where_the_mixture_is_another(ground, capsys):
    saved = mpoe.MPOEConfig(
        num_experts=4, moe_type="moe", layout="balanced", max_bond_dim=9, word_embed_bond_dim=9, attention_bond_dim=9,
        stacks=("decoder",), offset_scale=0.5, expert_dropout=0.1, second_policy_eval="none", seed=3,
    )  # fmt: skip
    mpoe.upcycle(tiny_t5(), saved).save_pretrained("first")
    tiny_tokenizer().save_pretrained("first")
    where = QUICK.index("--num_experts")
    again = [*QUICK[:where], *QUICK[where + 2 :], "--model_name_or_path", "first"]
    for flags, message in {
        "--num_experts 8": "num_experts: 4 there, 8 now",
        "--moe_type switch --top_k 1 --num_experts=4": "moe_type: moe there, switch now, top_k: 2 there, 1 now",
        "--linear_trunc 30000 --emb-trunc 30000 --attention_trunc=30000": "max_bond_dim: 9 there, None now, "
        "word_embed_bond_dim: 9 there, None now, attention_bond_dim: 9 there, None now",
        "--stacks encoder --offset_scale 0.3": "stacks: ('decoder',) there, ('encoder',) now, "
        "offset_scale: 0.5 there, 0.3 now",
        "--switch_dropout 0.2": "expert_dropout: 0.1 there, 0.2 now",
        "--second_policy_eval all": "second_policy_eval: none there, all now",
        "--task sentiment --num_experts 8": "num_experts: 4 there, 8 now",
    }.items():
        wrong = ["finetune", *again, *flags.split()]
        assert_refused(wrong, f"stays what it is ({message}); leave these flags out", ground, capsys)
    Path("eight.yaml").write_text("num_experts: 8\n")
    assert_refused(["finetune", "eight.yaml", *again], "num_experts: 4 there, 8 now", ground, capsys)

    Path("four.yaml").write_text(
        "num_experts: 4\nmoe_type: moe\nlayout: balanced\nstacks: null\nlinear_trunc: 9\nseed: 42\n"
    )
    equal = ["--top_k", "2", "--stacks", "decoder", "--second_policy_eval", "none"]
    assert main(["finetune", "four.yaml", *again]) == 0
    assert main(["finetune", "four.yaml", *again, *equal, "--output_dir", "more"]) == 0
    first, second = (mpoe.from_pretrained(folder).state_dict() for folder in ("run", "more"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_flag_that_says_the_default_makes_no_other_command(ground, capsys):
    finetune.run(QUICK)
    assert main(["finetune", *QUICK, "--layout", "extended", "--learning_rate", "1e-3", "--seed", "42"]) == 0
    assert "Found a finished run of this command" in capsys.readouterr().out
