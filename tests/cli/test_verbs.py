"""The verbs as one types them: output, one JSON object, exit codes, errors in one message."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.cells import cell_len
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.cli.test_cli import MAIN
from tests.folders import adapter_folder, base_folder, rows_file
from trimtab import LoraConfig
from trimtab.cli import app, main
from trimtab.errors import PeftError

VERBS = ("eval", "generate", "chat", "compare", "merge", "inspect", "diff", "check")
LABELS = [{"prompt": f"Is {i} even?", "completion": "yn"[i % 2]} for i in range(8)]
OBJECTS = [{"prompt": f"go {i}", "completion": json.dumps({"a": i})} for i in range(4)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("verbs")
    base_folder(root / "base")
    adapter_folder(root / "one", root / "base", 1)
    adapter_folder(root / "two", root / "base", 2)
    adapter_folder(root / "zero", root / "base", size=0)
    adapter_folder(root / "dora", root / "base", config=LoraConfig(use_dora=True, target_modules=["q_proj"]))
    shutil.copytree(root / "one", root / "run" / "checkpoint-5")
    broken = root / "broken"
    shutil.copytree(root / "one", broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(t for k, t in tensors.items() if "lora_B" in k).fill_(math.nan)
    save_file(tensors, broken / "adapter_model.safetensors")
    rows_file(root / "labels.jsonl", LABELS)
    rows_file(root / "objects.jsonl", OBJECTS)
    rows_file(root / "text.jsonl", [{"text": "plain words"}])
    rows_file(root / "empty.jsonl", [])
    (root / "pairs.csv").write_text("question,reply\nIs 1 even?,n\nIs 2 even?,y\n")
    return root


@pytest.fixture
def run(root, monkeypatch):
    """Run a verb in this process, in the fixture's folder."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*args: str, input: str | None = None, columns: int = 100):
        return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, list(args), input=input)

    return call


def ok(result):
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def one_object(result) -> dict:
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


# ---------------------------------------------------------------------- all of them
@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert f"Example: trimtab {verb}" in result.output
    assert "--json" in result.output
    assert "--verbose" in result.output


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_usage_ends_with_2(verb, run) -> None:
    assert run(verb, "--nonsense").exit_code == 2
    assert run(verb).exit_code == 2


ERRORS = (
    (["inspect", "base"], "base is a whole model, not an adapter. Give it as the model (--model base)."),
    (["inspect", "run"], "run is a folder of adapters, not one of them. Give one of those below it: run/checkpoint-5"),
    (["eval", "one", "--data", "none.jsonl"], "There is no file none.jsonl."),
    (["eval", "run", "--data", "labels.jsonl"], "It holds adapters: give one of them, such as run/checkpoint-5"),
    (["check", "one", "--for", "vllm,tgi"], "No rules for tgi."),
)


@pytest.mark.parametrize(("args", "words"), ERRORS, ids=lambda x: " ".join(x[:2]) if isinstance(x, list) else "")
def test_errors_are_one_message_and_1(root, monkeypatch, capsys, args, words) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["trimtab", *args])
    with pytest.raises(SystemExit) as exit:
        main()
    said = capsys.readouterr()
    assert exit.value.code == 1
    assert words in said.err
    assert said.err.startswith("trimtab: ")
    assert not said.out


@pytest.mark.slow  # each imports torch and transformers anew
@pytest.mark.parametrize(
    "args",
    [
        ["inspect", "one", "--json"],
        ["eval", "one", "--data", "labels.jsonl", "--json"],
        ["compare", "one", "-p", "Hello", "--json"],
        ["merge", "one", "-o", "merged", "--json"],
    ],
    ids=lambda a: a[0],
)
def test_json_is_all_there_is_on_stdout_of_a_process(root, args) -> None:
    done = subprocess.run([*MAIN, *args], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    assert "\x1b" not in done.stdout
    assert "Warning" not in done.stderr


def test_a_process_of_its_own(root) -> None:
    done = subprocess.run([*MAIN, "check", "base"], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 1
    assert done.stderr.startswith("trimtab: base is a whole model")
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_no_color_without_a_terminal(run) -> None:
    for args in (
        ("inspect", "one"),
        ("diff", "one", "two"),
        ("check", "dora"),
        ("compare", "one", "--max-new-tokens", "2"),
    ):
        assert "\x1b" not in run(*args).output


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(run, columns) -> None:
    for args in (
        ("inspect", "one"),
        ("inspect", "one", "--layers"),
        ("diff", "one", "two"),
        ("check", "dora"),
        ("compare", "one", "--data", "labels.jsonl", "--max-new-tokens", "9"),
        ("eval", "one", "--data", "objects.jsonl"),
    ):
        out = run(*args, columns=columns).stdout
        assert out
        assert max(map(cell_len, out.splitlines())) <= columns, args


# ---------------------------------------------------------------------- eval
def test_eval_of_labels(run) -> None:
    out = ok(run("eval", "one", "--data", "labels.jsonl")).stdout
    for words in (
        "one on ",
        "8 rows of labels.jsonl",
        "loss",
        "perplexity",
        "accuracy",
        "among the 2 labels",
        "50.0 %",
    ):
        assert words in out
    found = one_object(ok(run("eval", "one", "--data", "labels.jsonl", "--json")))
    assert found["rows"] == 8
    assert found["loss"]["labels"] == 2
    assert len(found["loss"]["rows"]) == 8
    assert found["answers"] is None
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]["loss"]))


def test_eval_generates_where_answers_are_longer(run) -> None:
    result = ok(run("eval", "one", "--data", "objects.jsonl"))
    for words in ("exact match", "field F1", "valid JSON", "4 answers are not exact", '{"a": 0}'):
        assert words in result.stdout
    found = one_object(
        ok(run("eval", "one", "--data", "objects.jsonl", "--json", "--limit", "2", "--metric", "exact_match"))
    )
    assert found["answers"]["metrics"] == {"exact_match": 0.0}
    assert found["answers"]["expected"] == ['{"a": 0}', '{"a": 1}']


def test_eval_of_a_base_on_columns_of_another_name(run) -> None:
    names = ("--prompt-field", "question", "--completion-field", "reply")
    found = one_object(ok(run("eval", "base", "--data", "pairs.csv", *names, "--json")))
    assert (found["adapters"], found["rows"]) == ({}, 2)
    same = one_object(ok(run("eval", "one", "--model", "base", "--data", "pairs.csv", *names, "--json")))
    assert same["adapters"] == {"one": "one"}
    assert same["loss"]["loss"] != found["loss"]["loss"]


def test_eval_of_a_broken_adapter_says_what_is_broken(run) -> None:
    result = run("eval", "broken", "--data", "labels.jsonl", "--json")
    assert isinstance(result.exception, PeftError)
    assert "is damaged: NaN" in str(result.exception)


def test_eval_of_nothing(run) -> None:
    for data, words in (("empty.jsonl", "has no rows"), ("none.jsonl", "no file")):
        result = run("eval", "one", "--data", data)
        assert isinstance(result.exception, PeftError)
        assert words in str(result.exception)


# ---------------------------------------------------------------------- generate
def test_generate_prints_the_answer_and_nothing_else(run) -> None:
    alone = ok(run("generate", "-a", "one", "-p", "Hello", "--max-new-tokens", "5"))
    found = one_object(ok(run("generate", "-a", "one", "-p", "Hello", "--max-new-tokens", "5", "--json")))
    (answer,) = found["answers"]
    assert alone.stdout.strip() == answer["text"]
    assert (answer["prompt"], answer["adapter"], len(answer["ids"])) == ("Hello", "one", 5)
    assert ok(run("generate", "-m", "one", "--max-new-tokens", "5", input="Hello\n")).stdout == alone.stdout


def test_generate_with_several_adapters_in_one_batch(run) -> None:
    args = ("generate", "-m", "base", "-a", "x=one", "-a", "two", "--base", "--max-new-tokens", "4")
    found = one_object(ok(run(*args, "-p", "Hello", "-p", "Good day", "--json")))
    assert [(a["prompt"], a["adapter"]) for a in found["answers"]] == [
        (p, n) for p in ("Hello", "Good day") for n in ("base", "x", "two")
    ]
    out = ok(run(*args, "-p", "Hello", "-p", "Good day")).stdout
    assert out.count("Hello") == 1
    assert all(f"{name}  " in out for name in ("base", "x", "two"))


def test_generate_from_rows(run) -> None:
    found = one_object(
        ok(run("generate", "-a", "one", "--data", "labels.jsonl", "--limit", "3", "--max-new-tokens", "2", "--json"))
    )
    assert [a["prompt"] for a in found["answers"]] == [row["prompt"] for row in LABELS[:3]]


def test_generate_needs_a_model_and_a_prompt(run) -> None:
    for args in (["-p", "x"], ["-m", "base", "-p", "x", "--data", "labels.jsonl"], ["-m", "base"]):
        assert run("generate", *args, input="").exit_code == 2
    result = run("generate", "-m", "base", "--data", "text.jsonl")
    assert "row 1: a row asks nothing" in str(result.exception)


# ---------------------------------------------------------------------- chat
def test_chat_from_a_pipe(run) -> None:
    lines = "Hello\n/adapter two\nHello\n/compare\n/reset\n/quit\nnever\n"
    result = ok(run("chat", "-m", "base", "-a", "one", "-a", "two", "--max-new-tokens", "4", input=lines))
    assert "two answers from now on" in result.stderr
    assert "never" not in result.output
    assert all(name in result.stdout for name in ("base", "one", "two"))
    found = one_object(ok(run("chat", "-a", "one", "--max-new-tokens", "4", "--json", input="Hello\n/base\nHello\n")))
    assert [m["role"] for m in found["messages"]] == ["user", "assistant"] * 2
    assert [e.get("adapter") or "note" for e in found["events"]] == ["one", "note", "note", "base", "note"]


def test_chat_without_a_template(run, tmp_path) -> None:
    base_folder(tmp_path / "bare", chat_template=None)
    result = run("chat", "-m", str(tmp_path / "bare"), input="Hello\n")
    assert "no chat template" in str(result.exception)
    assert ok(run("generate", "-m", str(tmp_path / "bare"), "-p", "Hello", "--max-new-tokens", "3"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "ends"),
    [(["chat", "-a", "one", "--max-new-tokens", "2"], 0), (["generate", "-a", "one", "-p", "Hello"], 130)],
)
def test_ctrl_c_is_clean(root, args, ends) -> None:
    """While chat waits for a line, and while generate is in the middle of an answer."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*MAIN, *args], cwd=root, **pipes)
    if args[0] == "chat":
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        process.stdout.readline()
        time.sleep(0.5)  # it reads again
    else:
        process.stdin.close()
        process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    said = process.stderr.read().decode()
    assert process.returncode == ends, said
    assert "Traceback" not in said


# ---------------------------------------------------------------------- compare
def test_compare_shows_both_and_the_null_adapter(run) -> None:
    out = ok(run("compare", "one", "--data", "labels.jsonl", "--max-new-tokens", "6")).stdout
    for words in ("Is 0 even?", "base", "one", "null", "loss", "accuracy", "answers changed", "KL from the base"):
        assert words in out
    assert "random B·A of the same norm" in out
    found = one_object(ok(run("compare", "one", "-p", "Hello", "--max-new-tokens", "6", "--json")))
    assert found["names"] == ["base", "one", "null"]
    assert found["changes_nothing"] is False
    assert found["prompts"][0]["sides"].keys() == {"base", "one", "null"}


def test_compare_says_when_nothing_changes_and_ends_with_1(run) -> None:
    result = run("compare", "zero", "-p", "Hello", "--max-new-tokens", "2")
    assert result.exit_code == 1
    assert "This adapter changes nothing: the norm of its delta is 0." in result.stdout
    result = run("compare", "zero", "-p", "Hello", "--max-new-tokens", "2", "--json")
    assert one_object(result)["changes_nothing"] is True
    result = run("compare", "broken", "-p", "Hello", "--max-new-tokens", "2")
    assert isinstance(result.exception, PeftError)
    assert "NaN" in str(result.exception)


# ---------------------------------------------------------------------- merge
def test_merge_and_its_other_name(run, tmp_path) -> None:
    for verb in ("merge", "fuse"):
        result = ok(run(verb, "one", "--output", str(tmp_path / verb)))
        for words in (
            "logit drift",
            "same next token",
            "100.0 %",
            "base float32, products float32, saved float32",
            "chat template",
        ):
            assert words in result.stdout
        assert "Loading it again" in result.stderr
        assert (tmp_path / verb / "model.safetensors").is_file()
    merged = one_object(
        ok(run("generate", "-m", str(tmp_path / "merge"), "-p", "Hello", "--max-new-tokens", "6", "--json"))
    )
    beside = one_object(ok(run("generate", "-a", "one", "-p", "Hello", "--max-new-tokens", "6", "--json")))
    assert merged["answers"][0]["ids"] == beside["answers"][0]["ids"]
    result = run("merge", "one", "--output", str(tmp_path / "merge"))
    assert "is there already" in str(result.exception)


# ---------------------------------------------------------------------- inspect, diff, check
def test_inspect(run) -> None:
    out = ok(run("inspect", "one")).stdout
    for words in ("LORA, CAUSAL_LM", "rank", "4, scale 2.00", "sha256", "q_proj x 2", "16x16"):
        assert words in out
    assert "model.layers.1.self_attn.q_proj" in ok(run("inspect", "one", "--layers")).stdout
    assert len(one_object(ok(run("inspect", "one", "--json")))["layers"]) == 14


def test_inspect_ends_with_1_on_a_fault(run) -> None:
    for name, words in (("zero", "it changes nothing"), ("broken", "NaN or infinity in 1 of 28 tensors")):
        result = run("inspect", name)
        assert result.exit_code == 1
        assert words in " ".join(result.stdout.split())
        result = run("inspect", name, "--json")
        assert result.exit_code == 1
        assert words in one_object(result)["faults"][0]


def test_inspect_shows_where_it_comes_from(run, root, tmp_path) -> None:
    shutil.copytree(root / "one", tmp_path / "x")
    content = {
        "base_model": {"name": "tiny", "fingerprint": {"a.weight": "abcdef"}},
        "data": {"rows": 9, "from": "d.jsonl", "sha256": "77" * 32},
        "scores": {"loss": 0.5}, "versions": {"trimtab": "0.1"},
    }  # fmt: skip
    (tmp_path / "x" / "trimtab.json").write_text(json.dumps(content))
    out = ok(run("inspect", str(tmp_path / "x"))).stdout
    for words in ("tiny, fingerprint abcdef", "9 of d.jsonl, sha256 777777777777", "loss 0.500", "trimtab 0.1"):
        assert words in out


def test_an_adapter_of_another_base_or_template_is_told(run, root, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimtab.train.provenance import fingerprint, provenance

    base_folder(tmp_path / "base", initializer_range=0.2)
    others = AutoTokenizer.from_pretrained(root / "base")
    others.chat_template += " "
    of_another = provenance("other", None, fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), others)
    adapter = str(shutil.copytree(root / "one", tmp_path / "one"))
    known = tmp_path / "one" / "trimtab.json"
    for args in (["eval", adapter, "--data", "labels.jsonl", "--limit", "1"], ["generate", "-a", adapter, "-p", "Hi",
                 "--max-new-tokens", "1"], ["compare", adapter, "-p", "Hi", "--max-new-tokens", "1"]):  # fmt: skip
        known.write_text(json.dumps(of_another))
        said = " ".join(ok(run(*args)).stderr.split())
        assert f"The adapter {adapter} was trained on other; you loaded {root / 'base'}, and" in said
        assert f"The adapter {adapter} was trained with another chat template than that of {root / 'base'}." in said
        known.write_text('{"base_model": null}')
        assert "was trained" not in ok(run(*args)).stderr


def test_diff(run) -> None:
    out = ok(run("diff", "one", "two")).stdout
    for words in ("cosine of the deltas", "disturbed by the other", "by chance", "layers.0.mlp.up_proj", "of 14"):
        assert words in out
    assert "bit for bit" in ok(run("diff", "one", "one")).stdout
    assert one_object(ok(run("diff", "one", "one", "--json")))["identical"] is True
    assert "only in a" in ok(run("diff", "one", "dora")).stdout
    assert one_object(ok(run("diff", "zero", "one", "--json")))["cosine"] is None


def test_check(run) -> None:
    assert ok(run("check", "one", "--for", "vllm,llama.cpp,peft")).stdout.count("yes") == 3
    result = run("check", "dora")
    assert result.exit_code == 1
    assert "no   vllm 0.32.0" in result.stdout
    assert "refuses DoRA" in result.stdout
    found = one_object(run("check", "dora", "--for", "vllm", "--json"))
    assert (found["fit"], found["engines"], found["findings"][0]["verdict"]) == (False, {"vllm": "0.32.0"}, "refused")
