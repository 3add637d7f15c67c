"""A short run of the load test: real clients and a real server, nothing lost and nothing wrong."""

import re

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("psutil")

import soak


def test_a_short_load_loses_nothing(monkeypatch, capsys):
    short = [asked | {"steps": 4} for asked in soak.CLIPS]
    monkeypatch.setattr(soak, "CLIPS", [short[1], short[-1]])
    monkeypatch.setattr(soak, "IMAGES", [short[0] | {"frames": 1}])
    is_well = soak.main(6 / 60) == 0
    told = capsys.readouterr().out
    assert is_well, told
    assert int(re.search(r"^clips +(\d+)$", told, re.M)[1]) > 0
