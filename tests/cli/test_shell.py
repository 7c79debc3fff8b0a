"""What the command says before any other: its help, its version, the nearest name; and how little it imports for it."""

import subprocess
import sys

import pytest

from mpoe.cli.commands import COMMANDS, JOBS
from mpoe.cli.main import main
from tiny import FLAGS, assert_refused


def test_help_lists_every_command_once_under_its_job(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [lines.index(f"{job}:") for job in JOBS]
    assert headings == sorted(headings)
    for name, command in COMMANDS.items():
        (line,) = [number for number, text in enumerate(lines) if text.startswith(f"  {name} ")]
        assert max(number for number in headings if number < line) == lines.index(f"{command.job}:")
        assert lines[line + 1].split("$ ")[1] == command.example
        assert command.example.startswith(f"mpoe {name} ") or command.example == f"mpoe {name}"
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fintune"], []])
def test_nothing_slow_is_imported_for_it(words):
    program = (
        "import sys, mpoe_command; sys.argv[1:] = sys.argv[1:]; status = mpoe_command.main()\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'yaml', 'rich') if name in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"[] {0 if words[:1] in (['--help'], ['--version']) else 2}"


def test_the_public_names_are_there_when_the_command_started_it_all():
    program = (
        "import mpoe_command, sys, mpoe\n"
        "assert 'torch' not in sys.modules\n"
        "names = [getattr(mpoe, name) for name in mpoe.__all__]\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert mpoe.MPOEConfig.quant_method in AUTO_QUANTIZER_MAPPING\n"
        "try: mpoe.upcicle\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'mpoe' has no attribute 'upcicle'\n"


def test_a_library_that_cannot_be_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["compare", "a"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: mpoe compare: import of datasets halted")
    assert error.endswith("mpoe doctor says what is missing or too old\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["comapre", "run"], "unknown command 'comapre': did you mean compare? commands are "),
        (["--tasks", "cola"], "unknown command '--tasks'; commands are inspect, compare"),
        (["predict", "run", "--tsk", "cola", "x"], "unknown flag --tsk: did you mean --task? mpoe predict --help"),
        (["predict", "run", "--zzz=1", "x"], "unknown flag --zzz; mpoe predict --help lists the flags"),
        (["finetune", "--model_name_or_pth", "m"], "--model_name_or_pth: did you mean --model_name_or_path?"),
        (["finetune", "--learning-rat", "1"], "unknown flag --learning-rat: did you mean --learning_rate?"),
        (["inspect", "--scal"], "unknown flag --scal: did you mean --scale?"),
        (["doctor", "--jsn"], "unknown flag --jsn: did you mean --json?"),
    ],
)
def test_the_nearest_name_is_suggested(command, message, tmp_path, capsys):
    assert_refused(command, message, tmp_path, capsys)


def test_texts_after_two_dashes_are_no_flags(capsys):
    assert main(["predict", "no_such_folder", "--", "--tsk"]) == 2
    assert "unknown flag" not in capsys.readouterr().err


def test_finetune_help_is_by_subject_and_help_all_has_the_rest(capsys):
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit, match="0"):
            main(["finetune", flag])
        shown[flag] = capsys.readouterr().out
    titles = [
        "model:", "mixture:", "layout extended:", "layout balanced:", "routers:",
        "routers of balanced and whole experts:", "speed and memory of layout balanced:", "what trains, and how fast:",
        "task:", "run:",
    ]  # fmt: skip
    for text in shown.values():
        places = [text.index(f"\n{title}") for title in [*titles, "from Transformers, the common ones"]]
        assert places == sorted(places)
        assert "--num-experts" not in text
        assert text.index("--router_jitter") > text.index("\nrouters:")
        assert "\nlayout extended:\n  --expert_rank N" in text
        assert text.index("--max_steps") > text.index("from Transformers")
    assert "--dataloader_pin_memory" not in shown["--help"]
    assert "--dataloader_pin_memory" in shown["--help_all"]


def test_dashes_are_read_as_underscores_though_the_help_does_not_say_them(ground, capsys):
    command = "--model-name-or-path model --task sentiment --data-dir nowhere --output-dir run --num-experts 2".split()
    assert_refused(["finetune", *command], "nowhere", ground, capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr_scheduler_kwargs", "x"], 'lr_scheduler_kwargs must be a JSON object, such as {"num_cycles": 2}; got'),
        (["--optim_args", "betas"], "optim_args must be key=value, and commas between several; got 'betas'"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be >= 1; got 0"),
        (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size must be >= 1; got 0"),
        (["--generation_num_beams", "0"], "generation_num_beams must be >= 1; got 0"),
        (["--label_smoothing_factor", "2"], "label_smoothing_factor must be in [0, 1]; got 2.0"),
        (["--save_steps", "0"], "save_steps must be > 0; got 0.0"),
        (["--max_steps", "0", "--num_train_epochs", "0"], "num_train_epochs must be > 0, or max_steps; got 0.0"),
        (["--report_to", "tensorbord"], "report_to must be none, all or of azure_ml"),
        (["--report_to", "wandb"], "report_to wandb needs its package, which is not installed"),
        (["--deepspeed", "x.json"], "deepspeed needs the package of that name: pip install deepspeed"),
        (["--metric_for_best_model", "acc", "--load_best_model_at_end", "--eval_strategy", "steps"], "['eval_loss', "),
        (["--optim", "adamw_bnb_8bit"], "pip install -U bitsandbytes"),
    ],
)
def test_what_transformers_takes_without_a_look_is_one_line_and_leaves_no_run(flags, message, ground, capfd):
    command = ["finetune", *FLAGS, "--save_steps", "20", *flags]
    assert main(command) == 2
    *_, error = capfd.readouterr().err.splitlines()
    assert error.removeprefix("\x1b[A").startswith("error: mpoe finetune: ")
    assert message in error
    assert not list(ground.glob("run/*"))


def test_a_failed_start_gives_its_folder_free(ground, capsys):
    assert main(["finetune", *FLAGS, "--optim", "adamw_bnb_8bit"]) == 2
    assert main(["finetune", *FLAGS, "--max_steps", "1"]) == 0
    capsys.readouterr()
    assert main(["finetune", *FLAGS, "--optim", "adafactor"]) == 2  # a run that wrote something keeps it
    assert "run holds another run" in capsys.readouterr().err


def test_what_is_missing_is_shown_by_an_example(capsys):
    assert main(["compare"]) == 2
    assert "required: RUN; for example: mpoe compare runs/dense runs/mpoe\n" in capsys.readouterr().err
    assert main(["inspect"]) == 2
    assert "required: --model/--config; for example: mpoe inspect t5-base" in capsys.readouterr().err


def test_a_wrong_device_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a b c")
    for device in ("gpu", "cuda:99"):
        assert main(["perplexity", "no_such_model", "--test_file", "text.txt", "--device", device]) == 2
        message = capsys.readouterr().err
        assert f"device must be one that torch has here, such as cpu; got {device}" in message
        assert message.count("\n") == 1


def test_transformers_lists_of_classes_are_left_out(ground, capsys):
    (ground / "text.txt").write_text("a b c")
    assert main(["perplexity", "model", "--test_file", "text.txt"]) == 2
    assert capsys.readouterr().err.endswith("for this kind of AutoModel: AutoModelForCausalLM.\n")
    assert main(["predict", "owner/model", "text"]) == 2
    assert "where no hub can be reached, mpoe fetch has small models\n" in capsys.readouterr().err


def test_a_file_that_the_system_refuses_is_named(tmp_path, monkeypatch, capsys):
    def refuse(argv):
        raise PermissionError(13, "Permission denied", "results.json")

    monkeypatch.setattr("mpoe.cli.compare.run", refuse)
    assert main(["compare", "a"]) == 2
    assert capsys.readouterr().err == "error: mpoe compare: results.json cannot be read or written: Permission denied\n"
