"""Every frame between router and worker: length-prefixed MessagePack of the structs below (architecture: Links).

``attempt`` is the router's number for one attempt of one request, never used again: a late frame of a lost attempt can
not be mistaken for the new one's. Token ids travel as little-endian uint32 in one ``bin``, hashes and checksums as
little-endian uint64, many sequences as columns. Decoding checks types, ranges, lengths and unknown fields.

A frame on the wire is a 4-byte little-endian length (at most ``MAX_FRAME``) and that many bytes.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from twinpool.cost import StepCost
from twinpool.sampling import SamplingParams, TokenLogprob

VERSION = 5
MAX_FRAME = 4 << 20
MAX_CONTEXT = 1 << 19  # tokens; MAX_FRAME holds their ids and block columns

Attempt = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Ids = Annotated[bytes, msgspec.Meta(max_length=4 * MAX_CONTEXT)]  # uint32 columns
Sums = Annotated[bytes, msgspec.Meta(max_length=8 * MAX_CONTEXT)]  # uint64 columns
Roles = Annotated[tuple[str, ...], msgspec.Meta(max_length=4)]


class Frame(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Base of all frames; the tag is the class name."""


# --- worker -> router ----------


class Model(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What all workers of a cell must agree on."""

    name: Name
    fingerprint: Name
    dtype: Name
    layout: Name
    block_size: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    block_bytes: Annotated[int, msgspec.Meta(ge=1)]
    vocab_size: Count
    max_context: Count
    eos_ids: tuple[Count, ...]


class Hello(Frame, frozen=True):
    """First frame of a link. ``epoch`` differs for each incarnation of a worker."""

    version: int
    worker: Name
    epoch: Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
    token: Annotated[str, msgspec.Meta(max_length=256)]
    roles: Roles  # "prefill", "decode"
    model: Model
    blocks: Count
    device: Name  # what computes, e.g. a GPU's name: workers on equal devices share one cost model
    cost: StepCost
    chunk_tokens: Count
    max_batch: Count
    kv_addresses: Annotated[dict[Name, Text], msgspec.Meta(max_length=8)]
    kv_secret: Annotated[bytes, msgspec.Meta(max_length=64)]
    pid: Count = 0


class Heartbeat(Frame, frozen=True):
    """Life sign; ``step`` counts engine steps, so that a hung engine does not look alive."""

    step: Count
    busy: bool


class Report(Frame, frozen=True):
    """State that changed, at most every 20 ms. ``free`` counts blocks that nobody needs (cached ones included)."""

    free: Count
    cached: Count
    running: Count  # sequences that decode
    waiting: Count  # sequences with prompt tokens to compute
    context: Count  # tokens of the decoding sequences together
    step_s: Seconds  # the last step
    leaked: Count = 0  # blocks that check_integrity() could not account for
    decode_batch: Count = 0  # the latest step of decodes alone since the last report; 0: there was none
    decode_context: Count = 0  # its sequences' tokens
    decode_s: Seconds = 0.0


class KvEvents(Frame, frozen=True):
    """Changes of the prefix cache since the last one; ``sequence`` has no gaps. ``reset`` starts from nothing."""

    sequence: Count
    stored: Sums
    removed: Sums
    reset: bool = False


class Reserved(Frame, frozen=True):
    """Room is booked under a lease; the first ``held`` full blocks of the prompt are here already."""

    attempt: Attempt
    held: Count


class NoRoom(Frame, frozen=True):
    """The reservation, or the local prefill, did not fit."""

    attempt: Attempt
    free: Count


class Progress(Frame, frozen=True):
    """Prompt tokens computed (or found cached: ``cached``) so far; ``step_s`` sums the steps this attempt was in.

    Always sent for the last chunk of a prompt; for an earlier one only where its step took longer or shorter than
    expected, or the cached prefix is not what Prefill said. ``pace``: its last one took so many times as long as by the
    cost of the Hello, 1 if nothing else is known.
    """

    attempt: Attempt
    done: Count
    cached: Count
    step_s: Seconds
    pace: Seconds


class BlocksReady(Frame, frozen=True):
    """Prompt blocks ``first``.. are final in the sender's pool. The last one may be partly filled."""

    attempt: Attempt
    first: Count
    blocks: Ids  # pool indices at the sender
    sums: Sums


class BlocksVerified(Frame, frozen=True):
    """All blocks of one Pull arrived and verified."""

    attempt: Attempt
    first: Count
    count: Count
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    seconds: Seconds
    backend: Name


class BlocksBad(Frame, frozen=True):
    """A Pull failed: blocks did not verify, or no byte came. Nothing is decoded from them."""

    attempt: Attempt
    reason: Name  # "checksum", "peer", "timeout"
    message: Text


class End(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A sequence is over with the tokens of this frame."""

    attempt: Attempt
    reason: Name  # "stop", "length"
    stop: str | int | None = None  # matched stop string or token id
    text: str = ""  # held back for a stop string that did not come


class Tokens(Frame, frozen=True):
    """One step's tokens, as columns: sequence i has ``counts[i]`` ids from output position ``positions[i]`` on.

    Ends travel in the same frame as the last tokens: a worker that dies between the two would have its stream resumed
    past its end.
    """

    attempts: Ids
    positions: Ids
    counts: Ids
    ids: Ids
    texts: tuple[str, ...]
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()  # empty, or one tuple a sequence
    ends: tuple[End, ...] = ()
    step: Count = 0
    step_s: Seconds = 0.0


class Preempted(Frame, frozen=True):
    """Out of blocks while decoding, or told to Yield: the attempt is gone here, finished blocks may still be cached."""

    attempt: Attempt


class Short(Frame, frozen=True):
    """Fewer blocks are free than sequences decode: unless some end soon, this attempt is preempted. Said once."""

    attempt: Attempt


class Failed(Frame, frozen=True):
    """The attempt cannot go on here."""

    attempt: Attempt
    reason: Name
    message: Text


class Leaving(Frame, frozen=True):
    """The worker wants to go (SIGTERM): send it no new work. The router answers Drain."""

    reason: Text


class Goodbye(Frame, frozen=True):
    """The drained worker is empty and closes the link."""

    reason: Text


# --- router -> worker ----------


class Welcome(Frame, frozen=True):
    """The worker is in. ``router`` differs for each start of the router: whatever an older one asked for is void."""

    router: Name
    heartbeat_s: Seconds
    lease_s: Seconds


class Refused(Frame, frozen=True):
    """The worker is not let in; the message has both sides' values."""

    reason: Name
    message: Text


class Ack(Frame, frozen=True):
    """Tokens frames up to this step were taken (credit: at most 4 are under way, later tokens are merged)."""

    step: Count


class Drain(Frame, frozen=True):
    """Finish what runs, take nothing new, say Goodbye."""


class SetRole(Frame, frozen=True):
    """From now on the worker belongs to these pools."""

    roles: Roles


class Snapshot(Frame, frozen=True):
    """Send KvEvents with ``reset`` and everything stored."""


class Reserve(Frame, frozen=True):
    """Book ``blocks`` blocks for a sequence with this prompt until the lease ends; answer Reserved or NoRoom."""

    attempt: Attempt
    prompt: Ids
    salt: Text
    blocks: Count
    lease_s: Seconds
    keep: Count = 0  # see Sequence


class Lend(Frame, frozen=True):
    """Hold what is cached of the leading blocks with these hashes; answer BlocksReady for them, from block 0 on.

    Another worker will pull them. ``attempt`` is the number of the loan: Renew, Release and Cancel know it.
    """

    attempt: Attempt
    hashes: Sums
    lease_s: Seconds


class Release(Frame, frozen=True):
    """Whatever this worker holds for the attempt is not needed any more (prefill side: KV was verified elsewhere)."""

    attempt: Attempt


class Renew(Frame, frozen=True):
    """These attempts' leases run for ``lease_s`` from now."""

    attempts: Ids
    lease_s: Seconds


class Sequence(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a worker needs to compute or continue one sequence."""

    tokens: Ids  # prompt, then the tokens of the output so far
    prompt_len: Count  # tokens of the prompt among them
    sampling: SamplingParams
    salt: Text
    itl_s: Seconds  # the SLO that bounds the steps it is in
    rank: Count = 0  # class: 0 realtime, 1 streaming, 2 batch
    keep: Count = 0  # leading blocks that its conversation will come back with, worth keeping when it has ended


class Prefill(Frame, frozen=True):
    """Compute ``sequence`` and draw one token. ``decode``: go on decoding here (path local).

    Without ``decode`` its blocks are announced (BlocksReady) as they are finished if ``transfer``, and held under a
    lease of ``lease_s`` until Release. ``cached`` prompt tokens are predicted to be in the worker's prefix cache.
    """

    attempt: Attempt
    sequence: Sequence
    decode: bool
    transfer: bool
    lease_s: Seconds
    cached: Count = 0


class Pull(Frame, frozen=True):
    """Copy these prompt blocks from the peer into the reservation of the attempt, and verify them.

    The reservation is for decoding, or for a prompt still to be computed: then the peer lends what it has cached.
    """

    attempt: Attempt
    first: Count
    blocks: Ids  # pool indices at the peer
    sums: Sums
    peer: Name
    peer_epoch: Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
    addresses: Annotated[dict[Name, Text], msgspec.Meta(max_length=8)]
    secret: Annotated[bytes, msgspec.Meta(max_length=64)]
    timeout_s: Seconds


class Decode(Frame, frozen=True):
    """Go on with ``sequence`` (prompt and tokens so far) as soon as its blocks 0.. are verified here."""

    attempt: Attempt
    sequence: Sequence


class Yield(Frame, frozen=True):
    """Preempt this running attempt: it goes on elsewhere. The answer is Preempted, unless it has ended."""

    attempt: Attempt


class Cancel(Frame, frozen=True):
    """Stop the attempt and free all it holds.

    ``suspect``: the receiver found its KV not to match the checksums, so check what is cached of it before.
    """

    attempt: Attempt
    suspect: bool = False


FromWorker = (
    Hello | Heartbeat | Report | KvEvents | Reserved | NoRoom | Progress | BlocksReady | BlocksVerified | BlocksBad
    | Tokens | Preempted | Short | Failed | Leaving | Goodbye
)  # fmt: skip
ToWorker = (
    Welcome | Refused | Ack | Drain | SetRole | Snapshot | Reserve | Lend | Release | Renew | Prefill | Pull | Decode
    | Yield | Cancel
)  # fmt: skip

from_worker = msgspec.msgpack.Decoder(FromWorker)
to_worker = msgspec.msgpack.Decoder(ToWorker)
_encoder = msgspec.msgpack.Encoder()


def encode(frame: Frame) -> bytes:
    """Length prefix and MessagePack of one frame. Raises ValueError above ``MAX_FRAME``."""
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME:
        raise ValueError(f"{type(frame).__name__} of {len(body)} bytes is above the frame limit of {MAX_FRAME}")
    return len(body).to_bytes(4, "little") + body
