"""What every job does with its command line."""

import pytest

from pipeline.config import InferConfig, TrainConfig, VerifyConfig, run_job


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
