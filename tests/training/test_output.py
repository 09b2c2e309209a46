"""What a training run finds in its output."""

import pytest

from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.training.output import check_output, clear


def test_a_damaged_record_is_one_clear_line(tmp_path):
    record = f"{tmp_path}/_run/config.json"
    storage.write_atomic(record, b'{"flags": ')
    with pytest.raises(ConfigError, match=f"{record} is damaged; take another --output"):
        check_output(TrainConfig(train="a", val="b", output=str(tmp_path)))
    with pytest.raises(ConfigError, match="is damaged"):
        clear(str(tmp_path))
    assert storage.exists(record)
