"""What every job does with its command line."""

import pytest

from pipeline.config import VerifyConfig, run_job


@pytest.mark.parametrize(
    ("resumes", "said"), [(True, "stopped; the same command goes on from here\n"), (False, "stopped\n")]
)
def test_a_stopped_job_says_whether_the_same_command_goes_on(monkeypatch, capsys, resumes, said):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["job", "--input", "in", "--output", "out"])
    assert run_job(main, VerifyConfig, None, resumes=resumes) == 130
    assert capsys.readouterr().err == said
