"""Files are read without running what is in them, and appear whole or not at all."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from synchromesh.compat.tutel.checkpoint.files import inside, of_rank, read, with_inside, write_all


def test_names_of_ranks():
    assert of_rank("a/{rank}-of-{size}", 1, 4) == Path("a/1-of-4")
    with pytest.raises(ValueError, match=r"wanted \{rank\} in it"):
        of_rank("a/model", 0, 2)


def test_a_file_with_other_objects_is_not_read(tmp_path):
    torch.save({"config": Fraction(1, 2)}, tmp_path / "pickled")
    (tmp_path / "text").write_text("no tensors")
    torch.save(torch.zeros(2), tmp_path / "tensor")
    for name in ("pickled", "text"):
        with pytest.raises(ValueError, match=r"not a file of tensors and plain .* `synchromesh convert") as raised:
            read(tmp_path / name)
        assert "weights_only" not in str(raised.value)
    with pytest.raises(ValueError, match="holds a Tensor, wanted a dict"):
        read(tmp_path / "tensor")


def test_all_files_appear_or_none(tmp_path):
    def files():
        yield tmp_path / "new" / "0", {"x": torch.ones(2)}
        raise ValueError("the second cannot be made")

    with pytest.raises(ValueError, match="the second"):
        write_all(files())
    assert not list((tmp_path / "new").iterdir())
    assert write_all([(tmp_path / "0", {"x": torch.ones(2)})]) == [tmp_path / "0"]
    assert read(tmp_path / "0")["x"].tolist() == [1, 1]


def test_a_nested_dict_is_found_and_replaced():
    content = {"a": {"b": {"x": 1}, "c": 2}, "d": 3}
    assert inside(content, "a/b", Path("file")) == {"x": 1}
    assert inside(content, "", Path("file")) is content
    assert with_inside(content, "/a/b", {"y": 2}) == {"a": {"b": {"y": 2}, "c": 2}, "d": 3}
    with pytest.raises(ValueError, match="file has no dict 'd' of the namespace 'd'; it has a, d"):
        inside(content, "d", Path("file"))
