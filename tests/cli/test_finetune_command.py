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
    from mpoe.training.tasks import get_task, load_task
    from mpoe.training.text_to_text import evaluate, tokenize, trainer_parts
    from mpoe.training.trainer import build_trainer

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
