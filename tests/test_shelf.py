"""A format of another package is found through its entry point, with no edit here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from packfmt import codecs, placement
from packfmt.errors import PlanError

TOY = '''
"""toy: 8 weights share a float32 scale; codes are signs."""

import numpy as np

from packfmt.codec import Codec
from packfmt.layout import Codes, Values, blocks, cols, grid

LAYOUT = blocks("toy", 8, Codes("codes", 1, (), (cols(1, 8),)), Values("scale", "<f4"), grid=grid("affine", zero=0))


def quantize(weight):
    scale = np.abs(weight).reshape(len(weight), -1, 8).max(2)
    return {"codes": (weight > 0).astype(np.uint8), "scale": scale}


CODEC = Codec(LAYOUT, {"sign": quantize})
'''


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, whose packages may declare formats."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    monkeypatch.undo()
    sys.modules.pop("toy_format", None)
    forget()


def forget() -> None:
    codecs._modules.cache_clear()
    codecs.get.cache_clear()


def declare(folder: Path, line: str) -> None:
    info = folder / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[packfmt.codecs]\n{line}\n")
    forget()


def test_a_format_of_another_package_is_a_format(elsewhere: Path) -> None:
    (elsewhere / "toy_format.py").write_text(TOY)
    declare(elsewhere, "toy = toy_format")
    assert "toy" in codecs.names() and {"q8_0", "q4_0", "mxfp4", "tq2_0"} < set(codecs.names())
    weight = np.array([[1, -2, 3, 0, 5, -6, 7, 8.5], [0, 0, 0, 0, 0, 0, 0, -1]], np.float32)
    packed = codecs.get("toy").encode(weight)
    assert packed.components["blocks"].tobytes() == bytes.fromhex("d5 00000841 00 0000803f")
    assert packed.decode().tolist() == [[8.5, 0, 8.5, 0, 8.5, 0, 8.5, 8.5], [0] * 8]
    again = placement.pack(packed.layout, packed.shape, packed.unpack())
    assert again["blocks"].tobytes() == packed.components["blocks"].tobytes()


def test_another_package_cannot_take_a_name_of_ours(elsewhere: Path) -> None:
    declare(elsewhere, "q4_0 = toy_format")
    with pytest.raises(PlanError, match="claims the format 'q4_0'"):
        codecs.names()
