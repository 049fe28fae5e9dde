import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmerge_bundle.names import check_key, check_module_path, check_name


@pytest.mark.parametrize("name", ["a", "0", "sql-v1.2+x@main_3", "x" * 128])
def test_good_adapter_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-v", "a/b", "a b", "a\n", "é", "x" * 129, "_a", "a\\b", "a:b"]
)
def test_bad_adapter_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"^adapter name .* is not allowed"):
        check_name(name)
    with pytest.raises(ValueError, match=r"^tag .* is not allowed"):
        check_name(name, what="tag")


@given(st.text())
def test_an_allowed_adapter_name_is_one_safe_path_part(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    assert name.isascii()
    assert not set(name) & set('/\\:*?"<>| \n\0')
    assert name not in {".", ".."}
    assert not name.startswith(("-", "."))


@pytest.mark.parametrize("path", ["q", "layers.0.q_proj", "modèle.0", "a-b.c d"])
def test_good_module_paths(path: str) -> None:
    assert check_module_path(path) == path


@pytest.mark.parametrize("path", ["", ".a", "a.", "a..b", "a/b", "a\nb", "\ud800", "x" * 1025])
def test_bad_module_paths(path: str) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        check_module_path(path)


@pytest.mark.parametrize("key", ["", "a\0", "\ud800", "x" * 1025])
def test_bad_keys(key: str) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        check_key(key)
