"""Nothing is made before it is asked for, and nothing twice."""

import pytest

from residrop.common.lazy import Lazy


def test_names_and_values_are_made_when_first_asked_for():
    calls = []
    lazy = Lazy(lambda: calls.append("names") or ("b", "a"), lambda name: calls.append(name) or name * 2)
    assert calls == []
    assert list(lazy) == ["b", "a"]
    assert calls == ["names"]
    assert lazy["a"] == lazy["a"] == "aa"
    assert calls == ["names", "a"]
    assert dict(lazy) == {"b": "bb", "a": "aa"}
    assert calls == ["names", "a", "b"]
    assert len(lazy) == 2


def test_an_unknown_name_is_not_made():
    lazy = Lazy(lambda: ("a",), lambda name: name)
    assert "b" not in lazy
    assert lazy.get("b") is None
    with pytest.raises(KeyError, match="'b'"):
        lazy["b"]
