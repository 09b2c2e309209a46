"""What every job does with its command line."""

import io

import pytest

from pipeline.config import InferConfig, MakeShardsConfig, TrainConfig, VerifyConfig, run_job


@pytest.mark.parametrize(
    ("resumes", "said"), [(True, "stopped; the same command goes on from here\n"), (False, "stopped\n")]
)
def test_a_stopped_job_says_whether_the_same_command_goes_on(monkeypatch, capsys, resumes, said):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["job", "--input", "in", "--output", "out"])
    assert run_job(main, VerifyConfig, None, resumes=resumes) == 130
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("config", "places"),
    [
        (InferConfig, ["--input", "in", "--output", "out"]),
        (TrainConfig, ["--train", "a", "--val", "b", "--output", "out"]),
    ],
)
def test_a_stopped_job_that_began_anew_goes_on_without_overwrite(monkeypatch, capsys, config, places):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["job", *places, "--overwrite"])
    assert run_job(main, config, None, resumes=True) == 130
    said = capsys.readouterr().err
    assert (
        said == "stopped; if it had begun to write, the same command without --overwrite goes on from here\n"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro draws other frames where a terminal has ASCII
@pytest.mark.parametrize(
    ("config", "flags", "said"),
    [
        (VerifyConfig, "--input a", "Missing from job: --output"),
        (MakeShardsConfig, "", "Missing from job: --format --images --output"),
        (InferConfig, "--scoer-threshold 3",
         "Unrecognized options: --scoer-threshold, 3; Perhaps you meant: --score-threshold"),
        (VerifyConfig, "--input a --oput b", "Missing from job: --output; Unrecognized options: --oput b"),
        (InferConfig, "--batch-size 1 --batch-size",
         "Missing value for argument '--batch-size'. Expected 1 values."),
        (InferConfig, "--batch-size x",
         "Error parsing --batch-size: invalid literal for int() with base 10: 'x'"),
        (InferConfig, "--device gpu",
         "invalid choice 'gpu' for argument '--device'. Expected one of ('auto', 'cpu', 'cuda')."),
    ],
)  # fmt: skip
def test_a_flag_that_can_not_be_read_is_one_line_and_exit_code_2(
    monkeypatch, capsys, config, flags, said, encoding
):
    monkeypatch.setattr("sys.argv", ["job", *flags.split()])
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert run_job(lambda given: 0, config, None) == 2
    assert capsys.readouterr().err == f"error: {said} (--help explains all flags)\n"


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--batch-size", "5000", "0 to 4096"),
        ("--max-decode-s", "inf", "over 0, up to 86400"),
        ("--max-decode-s", "nan", "over 0, up to 86400"),
    ],
)
def test_a_value_out_of_range_is_one_line_and_exit_code_2(monkeypatch, capsys, flag, value, allowed):
    monkeypatch.setattr("sys.argv", ["job", "--input", "a", "--output", "b", flag, value])
    assert run_job(lambda given: 0, InferConfig, None) == 2
    assert capsys.readouterr().err == f"error: {flag} {value} is out of range: {allowed}\n"


def test_help_is_printed_whole(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["job", "--help"])
    with pytest.raises(SystemExit) as ended:
        run_job(lambda given: 0, VerifyConfig, "Prove it.")
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert "Prove it." in said.out
    assert "The output folder to prove." in said.out
    assert said.err == ""
