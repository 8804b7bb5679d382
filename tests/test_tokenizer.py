"""Ids and templates of the embedded model, a folder made from it, and files that are wrong."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpool.chat import ChatTemplate
from twinpool.errors import ConfigError, InvalidRequest
from twinpool.gguf_meta import read_metadata
from twinpool.tokenizer import Tokenizer, embedded_model, load_tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße 👋 <b>&</b>"}]


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return load_tokenizer()


def write(folder: Path, files: dict[str, bytes | str | dict[str, Any]]) -> Path:
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture
def folder(embedded: Tokenizer, tmp_path: Path) -> Path:
    return write(tmp_path, dict(embedded.files()))


# --- the embedded model ----------------------------------------------------------------------------------------------


def test_facts_of_the_embedded_model(embedded: Tokenizer) -> None:
    assert (embedded.vocab_size, embedded.bos_id, embedded.eos_ids) == (49152, 1, (2,))
    assert embedded.max_context == 8192
    assert embedded.byte_level
    assert embedded.special_ids == frozenset(range(17))
    assert embedded.name.startswith("Smollm2 135M")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("!  12345", ["!", "  ", "1", "2", "3", "4", "5"]),
        ("Hello world", ["Hello", " world"]),
        ("a<|im_end|>b", ["a", "<|im_end|>", "b"]),
        ("", []),
    ],
)
def test_text_is_split_as_the_model_was_trained(embedded: Tokenizer, text: str, pieces: list[str]) -> None:
    assert [embedded.decode([token], skip_special_tokens=False) for token in embedded.encode(text)] == pieces


def test_known_ids(embedded: Tokenizer) -> None:
    """The ids of llama.cpp for the same file."""
    assert embedded.encode("!  12345") == [17, 256, 33, 34, 35, 36, 37]
    assert embedded.encode("<|im_start|>") == [1]


def test_a_bare_text_gets_no_bos(embedded: Tokenizer) -> None:
    assert embedded.encode("hi", add_special=True) == embedded.encode("hi")


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=("Cc", "Cs")) | st.sampled_from("\t\r\n")))
def test_every_text_survives_the_round_trip(embedded: Tokenizer, text: str) -> None:
    ids = embedded.encode(text)
    assert embedded.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(embedded.token_bytes, ids)) == text.encode()


def test_the_model_cannot_say_a_few_bytes(embedded: Tokenizer) -> None:
    """Six control characters, bytes that UTF-8 never has, and the lead bytes of planes without characters."""
    known = {embedded.token_bytes(token) for token in range(embedded.vocab_size)}
    missing = {byte for byte in range(256) if bytes([byte]) not in known}
    assert missing == {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}


def test_ids_outside_the_vocabulary_have_no_text(embedded: Tokenizer) -> None:
    assert embedded.decode([60_000]) == ""
    assert embedded.token_bytes(60_000) == b""


def test_a_lone_surrogate_is_refused(embedded: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="character 2"):
        embedded.encode("ab\ud83d")
    with pytest.raises(InvalidRequest, match="surrogate"):
        embedded.chat([{"role": "user", "content": "\udc00"}])


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_writes_the_models_form(embedded: Tokenizer) -> None:
    text = embedded.decode(embedded.chat(CHAT), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nGrüße 👋 <b>&</b><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    without = embedded.decode(embedded.chat(CHAT, add_generation_prompt=False), skip_special_tokens=False)
    assert text == without + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}], [{}]]
)
def test_messages_without_role_and_content_are_refused(embedded: Tokenizer, messages: list[Any]) -> None:
    with pytest.raises(InvalidRequest):
        embedded.chat(messages)


def render(source: str, **specials: str) -> str:
    return ChatTemplate(source, specials).render([{"role": "user", "content": "a<b"}])


def test_templates_have_what_models_expect() -> None:
    assert (
        render("{{ bos_token }}{{ messages | tojson }}", bos_token="<s>") == '<s>[{"role": "user", "content": "a<b"}]'
    )
    assert render("{% for m in messages %}{% break %}{% endfor %}.") == "."
    assert render("  {% generation %}\n{{ messages[0].content }}{% endgeneration %}") == "a<b"
    assert render("{{ 'date' if strftime_now is defined else 'no date' }}{{ tools is none }}") == "no dateTrue"


def test_a_template_may_refuse() -> None:
    with pytest.raises(InvalidRequest, match="only one system message"):
        render("{{ raise_exception('only one system message') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages[7].content.x }}",
        "{{ 1 // 0 }}",
        "{{ range(10**9) | list }}",
        "{% include '/etc/hostname' %}",
        "{{ 1 + 'a' }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox_or_crash(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


def test_a_template_that_does_not_compile_is_the_operators_fault() -> None:
    with pytest.raises(ConfigError, match="compile"):
        ChatTemplate("{% if %}", {})


def test_a_model_without_a_template_says_so(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(str(folder)).chat(CHAT)


# --- a folder --------------------------------------------------------------------------------------------------------


def test_the_files_rebuild_the_tokenizer(embedded: Tokenizer, folder: Path) -> None:
    again = load_tokenizer(str(folder))
    text = "!  12345 Grüße <|im_end|>\n"
    assert again.encode(text) == embedded.encode(text)
    assert again.chat(CHAT) == embedded.chat(CHAT)
    assert (again.eos_ids, again.bos_id, again.max_context) == (embedded.eos_ids, embedded.bos_id, embedded.max_context)
    assert again.special_ids == embedded.special_ids
    assert again.files() == embedded.files()


def test_transformers_reads_the_files_alike(embedded: Tokenizer, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    for text in ("!  12345", "Grüße 👩‍👩‍👧\n\n\tx", "a<|im_end|>b"):
        assert peer.encode(text, add_special_tokens=False) == embedded.encode(text)
    rendered = peer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert peer.encode(rendered, add_special_tokens=False) == embedded.chat(CHAT)


def test_a_folder_knows_more_ends_and_its_context(folder: Path) -> None:
    write(folder, {"generation_config.json": {"eos_token_id": [0, 2]}, "config.json": {"max_position_embeddings": 77}})
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.eos_ids == (0, 2)
    assert tokenizer.max_context == 77


def test_the_template_of_a_folder(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "<{{ messages[0].role }}>"}]
    config = {"chat_template": named, "eos_token": {"content": "<|im_end|>", "special": True}}
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(str(write(folder, {"tokenizer_config.json": config})))
    assert tokenizer.decode(tokenizer.chat(CHAT)) == "<system>"
    assert tokenizer.eos_ids == (2,)
    (folder / "chat_template.jinja").write_text("from the file")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode(tokenizer.chat(CHAT)) == "from the file"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\xff"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "{"),
        ("config.json", "nul"),
    ],
)
def test_files_that_are_wrong_are_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(str(folder))


def test_paths_that_hold_no_tokenizer(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.gguf"):
        with pytest.raises(ConfigError, match=path.name):
            load_tokenizer(str(path))


# --- GGUF ------------------------------------------------------------------------------------------------------------


def packed(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def packed_value(value: Any) -> bytes:
    if isinstance(value, list):
        items = [packed_value(item) for item in value]
        return (
            struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)
        )
    if isinstance(value, str):
        return struct.pack("<I", 8) + packed(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack("<Ii", 5, value)


def gguf(path: Path, meta: dict[str, Any]) -> Path:
    body = b"".join(packed(key) + packed_value(value) for key, value in meta.items())
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(meta)) + body)
    return path


def small_vocabulary(**changes: Any) -> dict[str, Any]:
    letters = [*(chr(code) for code in range(0x21, 0x7F)), "Ġ", "Ċ"]
    tokens = ["<s>", "</s>", *letters, "12", "123", "ab"]
    meta: dict[str, Any] = {
        "model": "gpt2",
        "pre": "default",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": ["1 2", "12 3", "a b"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (meta | changes).items()}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", ["ab", " ", "123", "4"]),
        ("smollm", ["ab", " ", "1", "2", "3", "4"]),
        ("llama-bpe", ["ab", " ", "123", "4"]),
        ("qwen2", ["ab", " ", "1", "2", "3", "4"]),
    ],
)
def test_each_splitting_rule(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = load_tokenizer(str(gguf(tmp_path / "m.gguf", small_vocabulary(pre=pre))))
    assert [tokenizer.decode([token]) for token in tokenizer.encode("ab 1234")] == pieces


def test_bos_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    def ids(**changes: Any) -> list[int]:
        return load_tokenizer(str(gguf(tmp_path / "m.gguf", small_vocabulary(**changes)))).encode("a", add_special=True)

    assert len(ids()) == len(ids(pre="llama-bpe", add_bos_token=False)) == 1
    assert ids(add_bos_token=True)[0] == ids(pre="llama-bpe")[0] == 0


def test_every_end_of_a_gguf(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf", small_vocabulary(eot_token_id=5, eom_token_id=1, bos_token_id=10**6))
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.max_context) == ((1, 5), None, None)
    assert tokenizer.name == "m"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "byte-level"),
        ({"pre": "from the future"}, "smollm"),
        ({"merges": ["1 2", "q z"]}, "do not fit"),
        ({"tokens": ["a", "a"]}, "vocabulary"),
    ],
)
def test_a_gguf_that_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(str(gguf(tmp_path / "m.gguf", small_vocabulary(**changes))))


def test_metadata_of_every_type(tmp_path: Path) -> None:
    meta = {"text": "é", "yes": True, "number": -5, "numbers": [1, 2], "texts": ["a", ""], "flags": [True, False]}
    read = read_metadata(gguf(tmp_path / "m.gguf", meta))
    assert read == meta | {"numbers": (1, 2), "flags": (True, False)}


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_header_is_an_error_and_nothing_worse(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = gguf(tmp_path_factory.getbasetemp() / "damaged.gguf", {"a": ["x", "y"], "b": 3, "c": [1, 2], "d": "text"})
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(ConfigError):  # anything else fails the test
        read_metadata(path)


def test_the_embedded_file_is_found_without_importing_its_package() -> None:
    assert embedded_model().suffix == ".gguf"
