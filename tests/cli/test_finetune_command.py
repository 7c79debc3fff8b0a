"""`mpoe finetune` as the paper trains: the reference's flags, several tasks, what trains, adapters, comparisons."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM

import mpoe
from mpoe.cli import finetune
from mpoe.cli.main import main
from mpoe.models import is_upcycled, mixtures
from mpoe.nn import DenseExperts, ExtendedExperts, MPOExperts
from mpoe.training.arguments import FinetuneTrainingArguments
from tiny import FLAGS, assert_refused, run_and_kill, tiny_batch, tiny_t5, tiny_tokenizer

ROOT = Path(__file__).parents[2]
# Two experts and a dozen tokens: one of them goes hungry.
pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")
QUICK = [*FLAGS, "--max_steps", "2", "--save_strategy", "no"]


def weights(folder):
    return mpoe.from_pretrained(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("flags", "top_k", "kind"),
    [
        ([], 2, ExtendedExperts),
        (["--layout=balanced", "--balancing=loss"], 1, MPOExperts),
        (["--layout=balanced", "--moe_type=moe"], 2, MPOExperts),
        (["--moe_type=switch", "--mpo_layers=nompo"], 1, DenseExperts),
        (["--moe_type=moe", "--mpo_layers=nompo", "--balancing=none"], 2, DenseExperts),
        (["--moe_type=switch", "--top_k", "3", "--num_experts", "4"], 3, ExtendedExperts),
    ],
)
def test_the_papers_rows_are_a_flag_apart(ground, flags, top_k, kind):
    finetune.run([*QUICK, *flags])
    model = mpoe.from_pretrained("run")
    for layer in mixtures(model).values():
        assert layer.router.top_k == top_k
        assert isinstance(layer.up, kind)


def test_a_second_evaluation_tells_what_the_routing_does(ground, capsys):
    flags = [*QUICK, "--learning_rate", "0.1", "--test_routing", "--include_num_input_tokens_seen", "true"]
    result = finetune.run(flags)
    plain, shuffled = result.tasks["sentiment"], result.shuffled["sentiment"]
    assert shuffled["test"].keys() == plain["test"].keys()
    assert shuffled["test"]["cross_entropy"] != plain["test"]["cross_entropy"]
    assert result.tokens_per_second > 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sentiment with the routing shuffled" in shown
    assert "input tokens a second" in shown
    assert finetune.run(flags).shuffled == result.shuffled


def test_the_references_own_spellings(ground, capsys):
    command = (
        "--model_name_or_path model --tasks cola --eval_tasks cola --data_dir data --output_dir run --max_steps 2 "
        "--use_cpu --disable_tqdm True --save_strategy no --mpo_layers=mlp --load_layer=noload --emb_trunc=30000 "
        "--linear_trunc=30000 --attention_trunc=30000 --moe_type=switch --num_experts=8 --mpo_lr 1e-4 "
        "--update_mpo_layer mlp --evaluation_strategy=no --label_smoothing 0.1 --overwrite_output_dir --do_test "
        "--capacity_factor 1.25 --switch_dropout 0.1 --train_AT_index 0,4 --is_scale_prob --layout balanced "
        "--balancing loss"
    )
    assert main(["finetune", *command.split()]) == 0
    captured = capsys.readouterr()
    assert "note: overwrite_output_dir has no effect: a finished run is never overwritten" in captured.err
    assert "auxiliary tensors" in captured.out
    assert "0.0001" in captured.out
    layer = next(iter(mixtures(mpoe.from_pretrained("run")).values()))
    assert (layer.router.num_experts, layer.router.capacity_factor, layer.dropout.p) == (8, 1.25, 0.1)
    assert json.loads(Path("run/run.json").read_text())["label_smoothing_factor"] == 0.1


def test_the_references_json_configs(ground, capsys):
    """Keys of its single-task and multi-task files, with values of a tiny run."""
    config = {
        "model_name_or_path": "model", "tokenizer_name": "model", "learning_rate": 3e-4, "output_dir": "run",
        "max_source_length": 128, "max_target_length": 128, "val_max_target_length": 128,
        "test_max_target_length": 128, "num_train_epochs": 100, "warmup_steps": 1, "eval_steps": 2,
        "overwrite_output_dir": True, "label_smoothing": 0.1, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 32, "save_steps": 2, "logging_first_step": True, "logging_steps": 200,
        "save_total_limit": 1, "temperature": 10, "do_train": True, "do_test": True, "do_eval": True,
        "predict_with_generate": True, "task_embedding_dim": 512, "split_validation_test": True,
        "non_linearity": "gelu_new", "load_best_model_at_end": True, "evaluation_strategy": "steps",
        "metric_for_best_model": "average_metrics", "greater_is_better": True, "max_steps": 4,
        "tasks": ["cola", "sentiment"], "eval_tasks": ["cola", "sentiment"],
    }  # fmt: skip
    Path("reference.json").write_text(json.dumps(config))
    flags = ["--data_dir", "data", "--use_cpu", "--disable_tqdm", "True", "--num_experts", "2"]
    assert main(["finetune", "reference.json", *flags]) == 0
    captured = capsys.readouterr()
    assert "task_embedding_dim has no effect" in captured.err
    results = json.loads(Path("run/results.json").read_text())
    assert set(results["tasks"]) == {"cola", "sentiment"}


def test_several_tasks_are_scored_each_and_on_average(ground, capsys):
    result = finetune.run([*QUICK, "--tasks", "cola", "sentiment", "--eval_strategy", "steps", "--eval_steps", "1"])
    assert list(result.tasks) == ["cola", "sentiment"]
    assert result.tasks["cola"]["dev"]["rows"] == 12  # both halves
    for split in ("validation", "test"):
        headline = [result.tasks["cola"][split]["matthews"], result.tasks["sentiment"][split]["accuracy"]]
        assert result.average[split] == pytest.approx(sum(headline) / 2)
    printed = capsys.readouterr().out
    assert "Task cola: 24 training, 6 validation, 6 test rows; its development set is halved" in printed
    assert "'eval_cola_matthews'" in printed
    assert "'eval_average_metrics'" in printed
    assert "average of the tasks' first metrics" in printed


def test_each_task_of_an_evaluation_is_scored_on_its_own_rows(ground):
    """The Trainer evaluates all tasks in one go; its numbers must be those of the tasks one by one."""
    from mpoe.training.arguments import FinetuneTrainingArguments
    from mpoe.training.tasks import get_task, load_task
    from mpoe.training.text_to_text import evaluate, tokenize, trainer_parts
    from mpoe.training.trainer import build_trainer
    from tiny import tiny_tokenizer

    tokenizer, model = tiny_tokenizer(), tiny_t5()
    args = FinetuneTrainingArguments(
        output_dir="run", use_cpu=True, disable_tqdm=True, generation_max_length=4, per_device_eval_batch_size=5,
        train_sampling_strategy="sequential", eval_strategy="no",
    )  # fmt: skip
    tasks = [get_task(name) for name in ("sentiment", "cola")]
    sets = [(task, tokenize(load_task(task, "data", 0).dev, tokenizer, 128)) for task in tasks]
    found = build_trainer(model, tokenizer, args, trainer_parts(model, tokenizer, args, None, sets)).evaluate()
    for task, rows in sets:
        trainer = build_trainer(model, tokenizer, args, trainer_parts(model, tokenizer, args, None, []))
        alone = evaluate(trainer, rows, task, tokenizer).metrics(task)
        for metric in task.metrics:
            assert found[f"eval_{task.name}_{metric}"] == pytest.approx(alone[metric])


def test_experts_are_in_the_encoder_for_labels_and_everywhere_for_texts(ground):
    Path("words.yaml").write_text("name: words\ntemplate: '{sentence}'\nmetrics: [bleu]\ntrain: words.csv\n")
    Path("words.csv").write_text("sentence,label\n" + "the film is good,good film\n" * 20)
    for task, stacks in (("cola", {"encoder"}), ("words.yaml", {"encoder", "decoder"})):
        finetune.run([*QUICK, "--task", task, "--output_dir", task[:4]])
        assert {name.split(".")[0] for name in mixtures(mpoe.from_pretrained(task[:4]))} == stacks


def test_rows_can_be_limited_by_split(ground):
    result = finetune.run([*QUICK, "--tasks", "cola", "sentiment", "--n_train", "8", "--n_val", "3", "--n_test", "5"])
    assert {name: splits["test"]["rows"] for name, splits in result.tasks.items()} == {"cola": 5, "sentiment": 5}
    assert {name: splits["validation"]["rows"] for name, splits in result.tasks.items()} == {"cola": 3, "sentiment": 3}
    assert "dev" not in result.tasks["cola"], "the development set was not evaluated whole"


def test_several_tasks_resume_in_the_middle_of_an_epoch(ground, monkeypatch):
    """Killed outright (SIGKILL) between two checkpoints; mask, rates and sampling go on where they were."""
    flags = [
        *FLAGS, "--tasks", "cola", "sentiment", "--max_steps", "7", "--save_steps", "3", "--gradient_mask_prob", "0.5",
        "--mpo_lr", "1e-4", "--switch_dropout", "0.1", "--dropout", "0.1", "--router_jitter", "0.1",
    ]  # fmt: skip
    unbroken = finetune.run([*flags, "--output_dir", "unbroken"])
    run_and_kill(flags, step=5)
    resumed = finetune.run(flags)
    assert same(weights("run"), weights("unbroken"))
    assert resumed.gradient_mask == unbroken.gradient_mask
    assert 0 < resumed.gradient_mask["discarded"] < resumed.gradient_mask["drawn"]
    assert resumed.tasks == unbroken.tasks


def test_mask_1_and_tensor_learn_leave_the_central_tensors_alone(ground):
    finetune.run([*QUICK, "--tensor_learn", "--output_dir", "frozen"])
    finetune.run([*QUICK, "--gradient_mask_prob", "1", "--output_dir", "masked"])
    frozen, masked = weights("frozen"), weights("masked")
    assert same(frozen, masked)
    dense = AutoModelForSeq2SeqLM.from_pretrained("model").state_dict()
    wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    assert torch.equal(frozen[wo.replace("wo.weight", "down.base.weight")], dense[wo])


def test_an_adapter_is_saved_beside_the_model(ground, capsys):
    result = finetune.run([*QUICK, "--tensor_learn", "--freeze_model"])
    assert "adapter in run/adapter" in capsys.readouterr().out
    assert result.adapter_bytes < Path("run/model.safetensors").stat().st_size
    base = mpoe.load_adapter(AutoModelForSeq2SeqLM.from_pretrained("model"), "run/adapter").eval()
    full, batch = mpoe.from_pretrained("run"), tiny_batch()
    with torch.no_grad():
        assert torch.equal(base(**batch).logits, full(**batch).logits)
    assert full.config.use_cache, "the Trainer's own use of the cache is not the model's"
    assert main(["predict", "run/adapter", "--task", "sentiment", "the film is great"]) == 0
    from_adapter = capsys.readouterr().out
    assert main(["predict", "run", "--task", "sentiment", "the film is great"]) == 0
    assert capsys.readouterr().out == from_adapter


@pytest.mark.filterwarnings("default:no adapter was saved")
def test_without_the_identity_gauge_the_model_is_saved_and_no_adapter(ground, capsys):
    assert main(["finetune", *QUICK, "--tensor_learn", "--layout", "balanced", "--gauge", "sqrt"]) == 0
    assert "warning: no adapter was saved" in capsys.readouterr().err
    assert Path("run/model.safetensors").is_file()
    assert not Path("run/adapter").exists()


def test_plain_mpo_without_a_mixture(ground, capsys):
    for flags in (["--num_experts", "1"], ["--moe_type="], ["--moe_type", "none"]):
        layers = ["--layout", "balanced", "--mpo_layers", "mlp,attention"]
        finetune.run([*QUICK, *flags, *layers, "--output_dir", f"run{len(flags[-1])}"])
        model = mpoe.from_pretrained(f"run{len(flags[-1])}")
        assert not mixtures(model)
        assert is_upcycled(model)
    assert "MPOs without a mixture" in capsys.readouterr().out


def test_experts_without_a_router(ground):
    finetune.run([*QUICK, "--moe_type", "none", "--expert_rank", "3"])
    model = mpoe.from_pretrained("run")
    assert not mixtures(model)
    experts = [module for module in model.modules() if isinstance(module, ExtendedExperts)]
    assert len(experts) == 2 * 2 * 3, "without a mixture there is no reason to leave the decoder out"
    assert {module.offsets_U.shape for module in experts} == {(6, 32), (6, 64)}


def test_weights_come_from_another_experiment(ground):
    finetune.run([*QUICK, "--output_dir", "first", "--learning_rate", "0.1"])
    flags = [*QUICK, "--load_experiment", "first", "--update_mpo_layer", "noupdate"]
    finetune.run([*flags, "--output_dir", "experts", "--load_layer", "mlp"])
    finetune.run([*flags, "--output_dir", "all", "--freeze_model_but_lm_head"])
    first, experts, everything = weights("first"), weights("experts"), weights("all")
    counted = {name for name in first if name.endswith((".pending", ".reference"))}  # by every training forward
    mlp = {name for name in first if "DenseReluDense" in name and name.startswith("encoder")}
    assert all(torch.equal(first[name], experts[name]) for name in mlp - counted)
    assert not torch.equal(first["shared.weight"], experts["shared.weight"])
    assert all(torch.equal(first[name], everything[name]) for name in first.keys() - {"lm_head.weight"} - counted)


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
        (["--mpo_layers", "mlp,attention"], "mpo_layers must be ['mlp'] with layout 'extended'"),
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
    assert same(weights("run"), weights("more"))


def test_a_flag_that_says_the_default_makes_no_other_command(ground, capsys):
    finetune.run(QUICK)
    assert main(["finetune", *QUICK, "--layout", "extended", "--learning_rate", "1e-3", "--seed", "42"]) == 0
    assert "Found a finished run of this command" in capsys.readouterr().out


def test_an_unfinished_run_is_no_model(ground, capsys):
    finetune.run([*QUICK])
    Path("run/results.json").unlink()
    capsys.readouterr()
    assert_refused(["predict", "run", "a text"], "repeat its command, which resumes it", ground, capsys)
    Path("run/checkpoint-2").mkdir()
    Path("run/checkpoint-2/trainer_state.json").write_text("{}")
    assert_refused(["predict", "run", "a text"], f"until then there is {Path('run/checkpoint-2')}", ground, capsys)
    assert_refused(["predict", "run"], "the following arguments are required: text", ground, capsys)


def test_runs_are_compared(ground, capsys):
    for name, flags in {"dense": ["--moe_type", "none", "--mpo_layers", "nompo"], "mpoe": []}.items():
        finetune.run([*QUICK, *flags, "--output_dir", f"runs/{name}"])
    capsys.readouterr()
    assert main(["compare", "runs/dense", "runs/mpoe/"]) == 0
    printed = capsys.readouterr().out
    assert "written to runs/comparison.md" in printed
    lines = Path("runs/comparison.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dense", "| mpoe"]
    assert main(["compare", "runs/dense", "runs/mpoe", "-o", "table.json"]) == 0
    rows = json.loads(Path("table.json").read_text())
    count = sum(p.numel() for p in mpoe.from_pretrained("runs/mpoe").parameters())
    assert rows[1]["parameters, M"] == count / 1e6
    assert main(["compare", "runs/dense", "data"]) == 2
    assert "data has no results.json" in capsys.readouterr().err
    assert main(["compare", "runs/dense", "-o", "table.xlsx"]) == 2
    assert "output must be a file .md, .csv, .json; got table.xlsx" in capsys.readouterr().err
    assert main(["compare", "runs/dense", "-o", "nowhere/table.md"]) == 2
    results = json.loads(Path("runs/dense/results.json").read_text())
    for damaged in (
        {},
        {**results, "steps": "4"},
        {**results, "parameters": {**results["parameters"], "router": None}},
        {**results, "trained": [5]},
        {**results, "routers": "0"},
        {**results, "gradient_mask": {"a": 1}},
        {**results, "tasks": {"sentiment": {"test": 1}}},
        {**results, "tasks": {"sentiment": {}}},
        {**results, "average": {}, "tasks": {name: {"test": {"accuracy": 1.0}} for name in "ab"}},
    ):
        Path("runs/dense/results.json").write_text(json.dumps(damaged))
        assert main(["compare", "runs/dense"]) == 2
        assert "runs/dense: a results.json must be what this version of mpoe wrote" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["finetune", "finetune_single_task"])
def test_the_scripts_run_their_configs(ground, name):
    """The very script and config of the repository; flags take the place of a model and data that tests have not."""
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    script = (ROOT / "scripts" / f"{name}.sh").read_text()
    assert f"configs/{name}.yaml" in script
    tasks = ["cola", "sentiment"] if name == "finetune" else ["cola"]
    flags = (
        "--model_name_or_path model --data_dir data --output_dir run --max_steps 2 --save_strategy steps "
        "--save_steps 1 --eval_strategy steps --eval_steps 1 --use_cpu --disable_tqdm True "
        "--per_device_train_batch_size 4"
    ).split()
    result = finetune.run([str(ROOT / "configs" / f"{name}.yaml"), *flags, "--tasks", *tasks])
    assert list(result.tasks) == tasks
    layer = next(iter(mixtures(mpoe.from_pretrained("run")).values()))
    assert layer.router.num_experts == config["num_experts"]
    assert result.gradient_mask["discarded"] <= result.gradient_mask["drawn"]
