"""Deltas joined are the decoded text, whatever the vocabulary, and stop strings end it whatever the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from twinpool.detokenizer import Detokenizer
from twinpool.errors import InvalidRequest
from twinpool.tokenizer import Tokenizer, load_tokenizer
from twinpool.tokenizer_files import TokenizerFiles

SAMPLE = "Grüße, 世界! 👩‍👩‍👧 def f(x):\n\treturn x ** 2  # naïve — e\u0301\u202e done\n\n\n"


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return load_tokenizer()


def word_piece_style() -> Tokenizer:
    """Sentencepiece's conventions: a word starts with U+2581, unknown characters fall back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz.,!?ü世", "▁▁", "▁t", "he", "▁the", "in"]
    merges = [("▁", "▁"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n")]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, special=True) for text in pieces[:3]])
    return Tokenizer(TokenizerFiles("pieces", backend, {}, (2,), None))


PIECES = word_piece_style()


def deltas(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str] = (), **options: Any) -> list[str]:
    detokenizer = Detokenizer(tokenizer, tuple(stops), **options)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]


def cut(text: str, stops: Sequence[str], include_stop: bool = False) -> str:
    """The definition: read character by character; at the first complete stop, the longest one there."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include_stop else end - len(stop)]
    return text


sayable = st.characters(max_codepoint=0x3FFFF, exclude_categories=("Cc", "Cs"))  # by the embedded model
texts = st.text(sayable, max_size=60) | st.text(alphabet="ab \n👍é世\u200d", max_size=60)
stop_strings = st.lists(st.text(alphabet="ab \n👍", min_size=1, max_size=4), max_size=3)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 49_200), max_size=60), skip=st.booleans())
def test_random_ids_join_to_the_decoded_text(embedded: Tokenizer, ids: list[int], skip: bool) -> None:
    joined = "".join(deltas(embedded, ids, skip_special_tokens=skip))
    assert joined == embedded.decode(ids, skip)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 700), max_size=60), skip=st.booleans())
def test_ids_that_are_mostly_lone_bytes_join_to_the_decoded_text(
    embedded: Tokenizer, ids: list[int], skip: bool
) -> None:
    assert "".join(deltas(embedded, ids, skip_special_tokens=skip)) == embedded.decode(ids, skip)


@settings(deadline=None)
@given(text=texts)
def test_text_comes_back(embedded: Tokenizer, text: str) -> None:
    for tokenizer in (embedded, PIECES):
        ids = tokenizer.encode(text)
        assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)
        assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(text=st.text(alphabet="ab \n👍", max_size=40), stops=stop_strings, include_stop=st.booleans())
def test_stop_strings_cut_at_characters_not_tokens(
    embedded: Tokenizer, text: str, stops: list[str], include_stop: bool
) -> None:
    for tokenizer in (embedded, PIECES):
        joined = "".join(deltas(tokenizer, tokenizer.encode(text), stops, include_stop=include_stop))
        assert joined == cut(text, stops, include_stop)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 700), max_size=40), stops=stop_strings, split=st.integers(0, 40))
def test_a_replayed_stream_goes_on_exactly(embedded: Tokenizer, ids: list[int], stops: list[str], split: int) -> None:
    whole = deltas(embedded, ids, stops)
    resumed = Detokenizer(embedded, tuple(stops))
    for token in ids[:split]:
        resumed.feed(token)
    assert [*(resumed.feed(token) for token in ids[split:]), resumed.flush()] == whole[min(split, len(ids)) :]


@given(text=st.text(alphabet="ab", max_size=30), stops=stop_strings)
def test_only_a_possible_beginning_of_a_stop_waits(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(PIECES, tuple(stops))
    shown, read = "", ""
    for token in PIECES.encode(text):
        shown += detokenizer.feed(token)
        read = PIECES.decode(PIECES.encode(text)[: len(read) + 1])
        if detokenizer.stopped is None:
            waiting = read[len(shown) :]
            assert waiting == "" or any(stop.startswith(waiting) for stop in stops)


def test_text_is_shown_as_soon_as_its_characters_are_complete(embedded: Tokenizer) -> None:
    ids = embedded.encode("a 世 b")
    parts = deltas(embedded, ids)
    assert parts[0] == "a"
    assert parts[-2:] == [" b", ""]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts)


def test_a_stop_ends_everything_after_it(embedded: Tokenizer) -> None:
    detokenizer = Detokenizer(embedded, ("world",))
    shown = [detokenizer.feed(token) for token in embedded.encode("hello world and more")]
    assert "".join(shown) == "hello "
    assert detokenizer.stopped == "world"
    assert detokenizer.feed(5) == detokenizer.flush() == ""


def test_the_longest_of_several_stops_at_one_place(embedded: Tokenizer) -> None:
    detokenizer = Detokenizer(embedded, ("b", "ab", "xab"))
    assert "".join(detokenizer.feed(token) for token in embedded.encode("1xab")) == "1"
    assert detokenizer.stopped == "xab"


def test_stops_do_not_count_before_min_tokens(embedded: Tokenizer) -> None:
    ids = [embedded.encode(char)[0] for char in "a.b.c.d."]
    assert "".join(deltas(embedded, ids, ["."], min_tokens=4)) == "a.b.c"
    assert "".join(deltas(embedded, ids, ["."], min_tokens=3)) == "a.b"


def test_an_unfinished_stop_and_an_unfinished_character_come_with_the_flush(embedded: Tokenizer) -> None:
    emoji = embedded.encode("👩")
    assert len(emoji) > 1
    parts = deltas(embedded, [*embedded.encode("end"), emoji[0]], ["end of it"])
    assert "".join(parts[:-1]) == ""
    assert parts[-1] == "end\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_shown_only_when_asked_for(embedded: Tokenizer) -> None:
    ids = [1, *embedded.encode("hi"), 2]
    assert "".join(deltas(embedded, ids)) == "hi"
    assert "".join(deltas(embedded, ids, skip_special_tokens=False)) == "<|im_start|>hi<|im_end|>"
    assert "".join(deltas(PIECES, [1, *PIECES.encode("hi"), 2])) == "hi"


def test_added_tokens_outside_the_byte_alphabet_stand_for_themselves(embedded: Tokenizer) -> None:
    backend = Backend.from_str(embedded.files()["tokenizer.json"].decode())
    backend.add_tokens([AddedToken("<a b\u4e16>", special=False)])
    tokenizer = Tokenizer(TokenizerFiles("more", backend, {}, (), None))
    ids = tokenizer.encode("x<a b\u4e16>y")
    assert len(ids) == 3
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids) == "x<a b\u4e16>y"


def test_an_empty_stop_is_refused(embedded: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        Detokenizer(embedded, ("",))


class Counted(Tokenizer):
    """Counts the ids that pass through ``decode``."""

    decoded = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("make_ids", [lambda t: t.encode("the inn "), lambda _: [3 + 0xF0], lambda _: [99_999]])
def test_the_work_for_a_token_does_not_grow(make_ids: Callable[[Tokenizer], list[int]]) -> None:
    """Also where no character is ever complete, or an id has no text at all."""
    tokenizer = Counted(TokenizerFiles("pieces", PIECES._backend, {}, (2,), None))
    ids = (make_ids(tokenizer) * 1000)[:1000]
    deltas(tokenizer, ids)
    assert tokenizer.decoded < 20 * len(ids)


def test_a_long_text_of_every_kind(embedded: Tokenizer) -> None:
    ids = embedded.encode(SAMPLE * 20)
    assert "".join(deltas(embedded, ids, ["\n\n\n\n"])) == SAMPLE * 20
