"""The Rust half of embkit: files, records, deduplication, tokens, search.

Arrays are numpy arrays, C-contiguous, of exactly the dtype that is stated. ``Shards`` are texts as
they lie in ``raw-*.safetensors``: per shard the UTF-8 bytes (u8) and ``n + 1`` offsets (u64); rows
count on across shards. Paths may be ``str`` or path-like.

Every function that works on data runs without the GIL. Those with a ``progress`` argument run on
threads of their own: ``progress(done)`` is called about every 50 ms and at the end, and Ctrl-C
stops them within 300 ms. ``threads=0`` means ``EMBKIT_THREADS`` or all that the system grants; the
number of threads never changes a result.

Errors: ``embkit.errors.UsageError`` (wrong arguments), ``CorruptError`` (damaged files; its
subclass ``FormatError`` for newer formats), and Python's own ``OSError`` subclasses with ``errno``
and ``filename``. File formats: docs/formats.md.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

_Path: TypeAlias = str | PathLike[str]
_U8: TypeAlias = NDArray[np.uint8]
_U16: TypeAlias = NDArray[np.uint16]
_U32: TypeAlias = NDArray[np.uint32]
_U64: TypeAlias = NDArray[np.uint64]
_I32: TypeAlias = NDArray[np.int32]
_F32: TypeAlias = NDArray[np.float32]
_Progress: TypeAlias = Callable[[int], object] | None
Shards: TypeAlias = Sequence[tuple[_U8, _U64]]
_FileInfo: TypeAlias = dict[str, int]  # length, header_crc, crc_crc: what a manifest records

__version__: str

# ---------------------------------------------------------------- checksums and publishing

def crc32c(data: bytes | bytearray) -> int:
    """CRC-32C (Castagnoli) of bytes."""

def blake3(data: bytes | bytearray) -> str:
    """BLAKE3 of bytes, 64 hex digits."""

def blake3_file(path: _Path) -> str:
    """BLAKE3 of a file's content, 64 hex digits. Raises OSError."""

def publish_file(path: _Path, data: bytes | bytearray) -> None:
    """Write a file that is whole or absent, also through power loss.

    A temporary file in the same directory, fsync, rename, fsync of the directory. The mode is that
    of the file replaced, or follows the umask; a symbolic link is replaced, not followed. Raises
    OSError with the old state intact.
    """

def publish_dir(tmp: _Path, final: _Path) -> None:
    """Move a finished directory to its final name in one step, everything in it fsynced first.

    Replaces a directory that is there; the old one is deleted last. Raises OSError with ``final``
    as it was and ``tmp`` still there, UsageError when ``tmp`` holds symbolic links.
    """

def sweep_tmp(dir: _Path) -> int:
    """Remove temporary files and directories of dead writers from ``dir``; returns how many.

    A live process's are kept, those of another machine for a week, and names that embkit did not
    make always.
    """

def temp_path(path: _Path) -> str:
    """A fresh temporary name beside ``path``, which :func:`sweep_tmp` recognises."""

def write_manifest(path: _Path, json: str) -> None:
    """Publish a JSON object in canonical form with a ``crc32c`` field over the rest.

    Raises UsageError for NaN, infinities, integers beyond 64 bits, or more than 16 MiB.
    """

def read_manifest(path: _Path) -> str:
    """Read and verify what :func:`write_manifest` wrote; canonical JSON with the ``crc32c`` field.

    Raises CorruptError for anything that is not exactly what was written.
    """

# ---------------------------------------------------------------- containers

def write_tensors(
    path: _Path,
    tensors: Sequence[tuple[str, str, Sequence[int], NDArray[Any]]],
    metadata: Mapping[str, str],
) -> _FileInfo:
    """Publish a checksummed ``.safetensors`` file.

    Args:
        path: the final name.
        tensors: ``(name, dtype, shape, data)``; dtype as the header has it (``"U16"``,
            ``"BF16"``, ...), data any array whose bytes are the tensor's, little-endian.
        metadata: strings; must have ``format`` and ``version``.

    Raises:
        UsageError: bytes that do not fit the shape, a double or reserved name (``crc``, ``pad``).
    """

def open_tensors(
    path: _Path, verify: str = "first-touch"
) -> tuple[dict[str, tuple[str, NDArray[Any]]], dict[str, str]]:
    """Map a file: ``({name: (dtype, array)}, metadata)``.

    The arrays are read-only views on the map, which lives as long as one of them. BF16 and F16 come
    as ``uint16``, F8 as ``uint8``. ``crc`` and ``pad`` are left out.

    Args:
        path: a file that embkit wrote.
        verify: ``"first-touch"`` and ``"open"`` verify every block here, because arrays can be
            touched at any time; ``"off"`` verifies the header only; ``"foreign"`` opens a plain
            safetensors file of another program (unaligned tensors are copied).
    """

def file_info(path: _Path) -> _FileInfo:
    """Length and checksums of a container file; verifies its header, not its data."""

def permute(n: int, key: int, start: int, count: int) -> _U64:
    """Positions ``start .. start + count`` of the permutation of ``[0, n)`` of ``key``.

    Costs O(count) whatever ``n`` is. docs/formats.md has the same in numpy.
    """

# ---------------------------------------------------------------- records

@final
class RecordsBuilder:
    """Collects records from sources, then gives texts and examples as arrays.

    A source that fails leaves no trace in the builder.

    Args:
        max_line: longest line in bytes; longer ones are rejected rows.
        dir: where texts go as they come, to ``raw-*.safetensors`` of at most ``text_bytes`` of
            text; those of an unfinished run are removed first. None keeps the texts in memory.
        threads: that parse.
    """

    def __new__(
        cls,
        max_line: int = 67108864,
        dir: _Path | None = None,
        text_bytes: int = 67108864,
        threads: int = 0,
    ) -> RecordsBuilder: ...
    def add_jsonl(
        self, path: _Path, source: str, task: str, kind: str = "auto", progress: _Progress = None
    ) -> None:
        """Read one ``.jsonl``, ``.jsonl.zst`` or ``.jsonl.gz`` file as a new source.

        ``kind``: ``"auto"`` (from the columns), ``"retrieval"``, ``"sts"``, ``"classification"``.
        Raises OSError, CorruptError (empty, truncated, wrong columns), UsageError (a source name
        used before, a task of another kind). Progress counts rows.
        """

    def add_lines(
        self,
        data: bytes | bytearray,
        source: str,
        task: str,
        kind: str = "auto",
        progress: _Progress = None,
    ) -> None:
        """Read whole lines of plain jsonl; the same source again continues it."""

    def add_arrow(
        self,
        data: Any,
        source: str,
        task: str,
        kind: str = "auto",
        progress: _Progress = None,
    ) -> None:
        """Read the rows of Arrow data; the same source again continues it.

        ``data`` has ``__arrow_c_stream__``: a pyarrow table, batch or reader. Columns, kinds and
        faults are those of jsonl: nulls are absent, texts that are not UTF-8 reject their row.
        """

    def finish(self) -> dict[str, Any]:
        """Everything read. The builder is used up.

        Returns:
            ``texts``: number of distinct texts, numbered in order of first appearance; ``shards``:
            number of raw shards in ``dir``, or 0 and the texts themselves in ``text`` u8,
            ``text_offsets`` u64 [n + 1], ``text_id`` u64 [n]; ``labels``: class names per task;
            ``examples``: per source ``source, task, kind`` and the columns ``line`` u64 [m],
            ``query`` u64 [m], ``positive_offsets`` u64 [m + 1], ``positive`` u64,
            ``negative_offsets``, ``negative``, ``negative_score`` f32, ``score`` f32 (NaN: none),
            ``label`` i32 (-1: none), ``weight`` f32;
            ``rejected``: per source ``source, task, read, kept, rejected, reasons`` (counts),
            ``samples`` (line, reason, excerpt) and ``extra_columns`` (counts).
        """

# ---------------------------------------------------------------- texts

def exact_duplicates(
    shards: Shards,
    priority: _U16 | None = None,
    punctuation: str = "keep",
    memory: int = 0,
    spill: _Path | None = None,
    threads: int = 0,
    progress: _Progress = None,
) -> _U64:
    """Representative row [n] of every row: the first of the lowest ``priority`` [n] among the rows
    whose normalised text is equal, itself when it is alone.

    ``punctuation="drop"`` compares words only (characters in scripts without spaces). Texts that
    say nothing are alone. Holds 40 bytes per row; with a cap of ``memory`` bytes (0: none), rows
    beyond it go through files in the directory ``spill``, to the same result. Progress counts rows.

    Raises:
        UsageError: unknown ``punctuation``, priorities of another length, no ``spill`` where it is
            needed, or bytes that are not UTF-8 (records refuse lone surrogates and broken UTF-8
            when they are read, so only hand-made shards get here).
    """

def near_duplicates(
    shards: Shards,
    threshold: float = 0.8,
    seed: int = 0,
    word_n: int = 3,
    char_n: int = 5,
    threads: int = 0,
    progress: _Progress = None,
    priority: _U16 | None = None,
    memory: int = 0,
    spill: _Path | None = None,
) -> tuple[_U64, _F32, int]:
    """Near-duplicate star clusters: ``(representative [n], similarity [n], pairs checked)``.

    MinHash proposes pairs, exact Jaccard similarity of shingles (``word_n`` words, or ``char_n``
    characters in scripts without spaces) decides; each member is at least ``threshold`` similar to
    its representative. Lower numbers of ``priority`` (one per row) are represented by no higher.
    Beyond ``memory`` bytes (0: no limit; at least 40 per row and 64 KiB, the texts and the sets of
    single texts not counted) records go through unnamed files in the directory ``spill``. Neither
    the order of rows nor threads nor ``memory`` change the result. Progress counts rows.
    """

def near_matches(
    shards: Shards,
    others: Shards,
    threshold: float = 0.8,
    seed: int = 0,
    word_n: int = 3,
    char_n: int = 5,
    threads: int = 0,
    progress: _Progress = None,
) -> tuple[_U64, _F32]:
    """A near-duplicate of each text among ``others``: ``(row [n], similarity [n])``.

    Row 2^64 - 1 and similarity 0 without one; of several any, the same every time. Texts are
    compared as by :func:`near_duplicates`. Progress counts rows of ``shards``.
    """

def contamination(
    train: Shards,
    eval: Shards,
    words: int = 13,
    chars: int = 50,
    common: int = 10,
    threads: int = 0,
    progress: _Progress = None,
    units: str = "auto",
    sets: _U32 | None = None,
) -> dict[str, Any]:
    """Training rows that contain evaluation text.

    Runs of ``words`` words (``chars`` characters in scripts without spaces; ``units`` = "words" or
    "chars" decides for all texts) count, unless more than ``common`` training rows have them; so
    does a whole text, however short. ``sets`` [evaluation rows] numbers the evaluation sets.

    Returns arrays of one entry per leaking row, h of them: ``train_row``, ``eval_row``, ``start``
    and ``end`` (bytes of the longest span in the training text), ``overlap`` (share of its units in
    any span, F32), ``runs`` (separate spans, U32), ``whole`` (equal to an evaluation text, bool),
    and the sets that have any of it as ``set_offsets`` U64 [h + 1] and ``sets`` U32. Beside them
    ``set_rows`` U64 (leaking rows per set), ``eval_texts`` (those with anything to compare), and of
    n-grams in too many rows: ``common`` (how many), ``common_only_rows`` (training rows that share
    nothing else), ``common_samples``: up to 100 ``(eval_row, start, end, train_rows)``.

    Progress counts training rows once each. Raises UsageError for runs of 0, unknown ``units``,
    wrong ``sets``, and texts above 128 MiB or not UTF-8.
    """

def text_ids(shards: Shards, threads: int = 0, progress: _Progress = None) -> _U64:
    """Identity of each text [n]: 64 bits of a hash of its bytes. Progress counts rows."""

def tokenize(
    out_dir: _Path,
    shards: Shards,
    row: _U64,
    prompt: _U16,
    prompts: Sequence[str],
    role: _U8,
    source: _U16,
    text_id: _U64,
    cluster: _U64,
    tokenizer_json: str,
    max_length: Sequence[int],
    shard_bytes: int = 67108864,
    threads: int = 0,
    backend: str = "auto",
    refuse_long: bool = False,
    progress: _Progress = None,
) -> dict[str, Any]:
    """Encode rows into ``texts-*.safetensors`` and ``raw-*.safetensors`` in ``out_dir``.

    Output row ``i`` is the text ``row[i]`` behind ``prompts[prompt[i]]``, cut to
    ``max_length[role[i]]`` tokens; ``source``, ``text_id`` and ``cluster`` are copied. Shards that
    an earlier run published and that verify are adopted. Progress counts rows. ``backend`` is
    ``"auto"`` or ``"tokenizers"``, with the same bytes. With ``refuse_long`` a text above its limit
    is a UsageError once all are encoded.

    Returns:
        ``shards``, ``rows``, ``tokens``, ``truncated`` and ``adopted`` (rows), ``backend`` (names
        and versions), ``slow`` (why the fast path was not used, or None), ``files`` (name to what
        :func:`file_info` gives).
    """

@final
class Store:
    """An open token store; may be read from several threads at once.

    Args:
        dir: the directory with the shards.
        verify: ``"first-touch"`` (blocks when they are read), ``"open"``, ``"off"``.
        files: (length, header_crc, crc_crc) of each shard, which must have them.
        read_ahead: when batches come from a disk, ask the system for all rows of one at once.

    Raises CorruptError and OSError on opening and on reading, UsageError for a row beyond the end.
    """

    def __new__(
        cls,
        dir: _Path,
        verify: str = "first-touch",
        files: dict[str, tuple[int, int, int]] | None = None,
        read_ahead: bool = True,
    ) -> Store: ...
    @property
    def rows(self) -> int:
        """Number of rows."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""

    @property
    def shards(self) -> int:
        """Number of shards."""

    def lengths(self, rows: _U64) -> _U32:
        """Tokens of each row."""

    def text_id(self, rows: _U64) -> _U64:
        """Identity of each row's text, without its prompt."""

    def cluster(self, rows: _U64) -> _U64:
        """Near-duplicate cluster of each row's text."""

    def role(self, rows: _U64) -> _U8:
        """Role of each row: 0 query, 1 passage, 2 both."""

    def source(self, rows: _U64) -> _U16:
        """Source of each row, an index into the manifest's list."""

    def prompt_len(self, rows: _U64) -> _U16:
        """Tokens of each row's prompt, BOS or CLS included."""

    def text(self, row: int) -> str:
        """Text of a row, without its prompt."""

    def gather(self, rows: _U64, out_tokens: NDArray[Any], out_cu_seqlens: _I32) -> int:
        """Pack rows into ``out_tokens`` (int64 or int32, 1-D) and their bounds into
        ``out_cu_seqlens`` [len(rows) + 1]; returns the number of tokens."""

    def gather_padded(
        self, rows: _U64, out_ids: NDArray[Any], out_mask: NDArray[Any], pad_id: int
    ) -> int:
        """Write rows side by side, as wide as the longest, to the front of ``out_ids`` (int64 or
        int32, 1-D) and ``out_mask`` (int64, int32, uint8 or bool, 1-D), with ``pad_id`` and 0
        behind the end of a row; returns the width."""

# ---------------------------------------------------------------- batches

_Part: TypeAlias = tuple[int, int, int, int]  # task, ordinal, epoch, place in the epoch

@final
class Plan:
    """Which task and examples each step takes: a function of (seed, step), O(1) for any step.

    Steps come in blocks in which each task has its share by largest remainder, in a permuted order.
    A task's epoch is a permutation of its examples in whole batches; the rest of an epoch is
    dropped, another rest each epoch.

    Args:
        seed: of the order.
        tasks: ``(name, usable examples, weight)``; weights of any scale, 0 never comes.
        batch_size: examples of a step.
        exhausted: ``"repeat"``: a task starts its next epoch for ever. ``"drop"``: after ``epochs``
            it leaves the mixture, and the plan ends with the last task. ``"stop"``: the plan ends
            with the last block for which every task has batches.
        epochs: for ``"drop"`` and ``"stop"``.
        batch_sizes: of single tasks, in the place of ``batch_size``.

    Raises UsageError: no task of weight, a task smaller than a batch, a share below 1 in 4,096.
    """

    def __new__(
        cls,
        seed: int,
        tasks: Sequence[tuple[str, int, float]],
        batch_size: int,
        exhausted: str = "repeat",
        epochs: int = 1,
        batch_sizes: Sequence[tuple[str, int]] = ...,
    ) -> Plan: ...
    @property
    def steps(self) -> int | None:
        """Steps until the plan ends; None when it never does."""

    @property
    def counts(self) -> list[int]:
        """Steps of each task in a block of the first mixture."""

    def batches_per_epoch(self, task: int) -> int:
        """Whole batches in one pass over a task."""

    def count_before(self, step: int) -> list[int]:
        """Batches of each task in the steps before ``step``: the cursors of a checkpoint."""

    def part(self, step: int) -> _Part:
        """Task of a step, that task's batches before, its epoch, and the place in the epoch."""

    def tasks_of(self, first: int, count: int) -> _U32:
        """Number of the task of each of ``count`` steps; steps after the end are left out."""

    def examples(self, step: int) -> _U64:
        """The examples of a step [batch_size], in the order of the global batch."""

@final
class Loader:
    """Makes the batches of a run; any step, in any order, from any thread.

    Args:
        store: an open store.
        tasks: ``(name, kind, examples file, negatives file or None, weight)``.
        seed, batch_size, exhausted, epochs, batch_sizes: as for :class:`Plan`; the seed is of all
            draws too.
        token_budget: tokens of a micro-batch (with padding when ``padded``).
        hard: hard negatives per retrieval example. hard_rule: ``"sample"`` (without replacement,
            anew each epoch) or ``"top"`` (the first of the list).
        padded: rectangles instead of packed rows. pad_id: fills them.
        no_duplicates: examples that share a cluster are kept out of each other's batches, by
            reordering inside superblocks of 64 batches.
        prompt_dropout: share of the queries, and of the examples' passages, whose row without the
            prompt is taken.

    Raises UsageError, CorruptError: what cannot be trained on, before the first step.
    """

    def __new__(
        cls,
        store: Store,
        tasks: Sequence[tuple[str, str, _Path, _Path | None, float]],
        *,
        seed: int,
        batch_size: int,
        token_budget: int,
        hard: int = 0,
        hard_rule: str = "sample",
        padded: bool = False,
        pad_id: int = 0,
        no_duplicates: bool = False,
        prompt_dropout: float = 0.0,
        exhausted: str = "repeat",
        epochs: int = 1,
        batch_sizes: Sequence[tuple[str, int]] = ...,
    ) -> Loader: ...
    @property
    def plan(self) -> Plan:
        """The plan of the run."""

    @property
    def tasks(self) -> list[tuple[int, int, str]]:
        """Per task: usable examples, unusable ones, and why those are."""

    def examples(self, step: int) -> tuple[int, _U64]:
        """``(task, examples u64 [B])`` of a step, in the order of the global batch."""

    def listed(self, task: int, examples: _U64) -> _U32:
        """Hard negatives that the table lists for each of some examples of a task."""

    def batch(self, step: int, rank: int = 0, world: int = 1, starts: _U64 | None = None) -> Batch:
        """The batch of ``rank`` among ``world``; a pure function of its arguments.

        Args:
            starts: u64 [B], for each example of the global batch where its hard negatives begin in
                its list, whatever ``hard_rule``; a list that ends sooner gives its last ones.
        """

@final
class Batch:
    """One step's input on one rank: b examples, H hard negatives each, R distinct rows."""

    @property
    def part(self) -> _Part:
        """As :meth:`Plan.part`."""

    @property
    def kind(self) -> str:
        """Kind of the task."""

    @property
    def examples(self) -> _U64:
        """Numbers of the task's usable examples [b]."""

    @property
    def rows(self) -> _U64:
        """The distinct rows [R], in the order of the micro-batches."""

    @property
    def hard_count(self) -> int:
        """H."""

    @property
    def tokens(self) -> int:
        """Real tokens."""

    @property
    def micro_count(self) -> int:
        """Micro-batches that every rank runs: the most of any."""

    @property
    def micro(self) -> list[tuple[int, int, int, int, int]]:
        """Per micro-batch: first row, rows, longest row, first token, tokens in the buffer."""

    def layout(self, wide: bool = True) -> tuple[dict[str, tuple[str, int, int]], int]:
        """``({name: (dtype, elements, first byte)}, bytes)`` of a buffer that holds the arrays.

        ``wide``: int64 tokens, masks and positions instead of int32.
        """

    def fill(self, buffer: _U8, wide: bool = True) -> None:
        """Gather the tokens and write all arrays into ``buffer``, without the GIL."""

def micro_batches(lengths: _U32, budget: int, padded: bool = True) -> tuple[_U32, _U64]:
    """Cut rows into micro-batches of at most ``budget`` tokens: ``(order, ends)``.

    ``order`` [n] are positions by falling length; micro-batch i is ``order[ends[i - 1]:ends[i]]``.
    Padded micro-batches are cut where padding plus a price per batch is least in sum.
    """

def first_fit(
    keys: _U64, columns: int, order: _U64, batch_size: int, progress: _Progress = None
) -> tuple[_U64, _U64]:
    """Rows in batches in which no value comes twice: ``(rows [n], ends [batches])``.

    Args:
        keys: values of row i at ``keys[i * columns:][:columns]``, across all columns.
        order: rows in the order in which each goes to the first batch that has room and none of
            its values. Batches that could not be filled are among the others.

    Progress counts rows. Raises UsageError for keys that are no table, and rows beyond it.
    """

# ---------------------------------------------------------------- rule filters

def filter_texts(
    shards: Shards,
    rules: Sequence[tuple[str, bool, float, int]],
    languages: Sequence[int] | None = None,
    detect: bool = False,
    threads: int = 0,
    progress: _Progress = None,
) -> tuple[_U32, _U16]:
    """Which rules each text fails, and its language: ``(failed [n], language [n])``.

    Args:
        shards: the texts.
        rules: at most 31 of ``(statistic, least, threshold, from_words)``: values below the
            threshold fail when ``least``, else values above it; texts of fewer words pass.
        languages: codes that are wanted, None for all. detect: tell the language in any case.

    Returns:
        Bit i of ``failed`` is rule i, bit 31 an unwanted language; ``language`` is a place in the
        list of :func:`filter_names`, 0 when not known or not looked for. Progress counts texts.
    """

def text_statistics(shards: Shards, rows: _U64) -> NDArray[np.float64]:
    """Every statistic of the texts at ``rows``: [rows x statistics], row-major."""

def filter_names() -> tuple[list[str], list[str], list[str]]:
    """Names of the statistics, ISO 639-3 codes of the languages, phrases of page furniture."""

# ---------------------------------------------------------------- stores out of stores

def merge_rows(
    stores: Sequence[tuple[_Path, int]],
    form: _U8,
    source: _U16,
    max_length: Sequence[int],
    progress: _Progress = None,
) -> tuple[list[_U64], dict[str, Any]]:
    """Rows of a merged store; every distinct (prompt, text) once, where it came first.

    Args:
        stores: directory and number of shards of each; rows count on from store to store.
        form: which prompt stands before each row's text. source: its source in the merged list.
        max_length: limit in tokens by role (query, passage, both).

    Returns:
        The merged row of each row, one array per store; and the columns ``row`` (whose tokens are
        taken), ``text_id``, ``cluster``, ``role``, ``source`` of the merged rows, with
        ``lengthened``, the rows of the first store that took longer tokens from another. Progress
        counts rows.
    """

def compose_store(
    out_dir: _Path,
    stores: Sequence[tuple[_Path, int]],
    row: _U64,
    text_id: _U64,
    cluster: _U64,
    role: _U8,
    source: _U16,
    digest: str,
    max_length: Sequence[int],
    shard_bytes: int = 67108864,
    progress: _Progress = None,
) -> dict[str, int]:
    """Write rows of stores as the shards of a new one into ``out_dir``.

    Shards of the first store that stay as they are get linked; those that an earlier run with the
    same ``digest`` has written and that verify are adopted. Progress counts rows.

    Returns:
        ``shards``, ``rows``, ``tokens``, ``truncated`` (rows as long as their limit), ``linked``
        and ``adopted`` (rows).
    """

# ---------------------------------------------------------------- search

_Vectors = _F32 | _U16 | Sequence[_F32 | _U16]

def search_isa() -> str:
    """The instruction set that searches run on: ``amx-int8``, ``avx512-vnni``, ``avx2`` ..."""

def topk(
    queries: _Vectors,
    corpus: _Vectors,
    k: int,
    memory: int = 0,
    threads: int = 0,
    progress: _Progress = None,
) -> tuple[_U32, _F32]:
    """The ``k`` corpus rows with the largest inner product per query, exactly; ties by lower row.

    Args:
        queries: float32 [nq, d], or uint16 [nq, d] with the bits of float16, or several such arrays
            that follow one another.
        corpus: [n, d], likewise. k: at most n.
        memory: bytes beside vectors and result, 0 for 2 GiB; no effect on the result.

    Returns:
        ``(row [nq, k], score [nq, k])``, best first. Progress counts queries.
    """

@final
class Ivf:
    """A corpus sorted into lists around centroids, for approximate search.

    Args:
        corpus: as for :func:`topk`; pass the same one to the methods.
        lists: 0 chooses by the number of rows. seed: of the clustering.
    """

    def __new__(
        cls,
        corpus: _Vectors,
        lists: int = 0,
        seed: int = 0,
        threads: int = 0,
        progress: _Progress = None,
    ) -> Ivf: ...
    @property
    def lists(self) -> int:
        """How many lists there are."""
    def calibrate(
        self,
        queries: _Vectors,
        corpus: _Vectors,
        k: int,
        recall: float,
        seed: int = 0,
        memory: int = 0,
        threads: int = 0,
    ) -> tuple[int, float, float, int]:
        """``(probes, recall, error, queries)``: the fewest lists per query that reach a recall, the
        recall that they were measured to have, its standard error, and on how many queries.
        """
    def search(
        self,
        queries: _Vectors,
        corpus: _Vectors,
        k: int,
        probes: int,
        threads: int = 0,
        progress: _Progress = None,
    ) -> tuple[_U32, _F32]:
        """The ``k`` nearest rows among the ``probes`` lists nearest to each query; see topk."""

@final
class NegativeFilter:
    """The rules that turn neighbours into hard negatives, for one corpus and block after block.

    Args:
        cluster: near-duplicate cluster of each corpus row.
        text: each corpus row's row in ``shards``, and its name in the result.
        shards: texts; may be empty when ``near_jaccard`` is None.
    """

    def __new__(cls, cluster: _U64, text: _U64, texts: Shards) -> NegativeFilter: ...
    def run(
        self,
        row: _U32,
        score: _F32,
        queries: tuple[_U32, _U64, _U32, _U64, _U64, _U64, _U32, _F32],
        params: Mapping[str, Any],
        rerank: tuple[_U64, _U32, _F32, _F32] | None = None,
        threads: int = 0,
        progress: _Progress = None,
    ) -> dict[str, Any]:
        """Negatives of m queries: ``offsets``, ``row`` (names), ``score``, ``rank``, ``audit``,
        ``shallow`` (queries whose list was too short), and with ``trace`` the rule, rank and number
        compared with of every candidate.

        Args:
            row, score: lists of candidates [lists, c], corpus rows, best first.
            queries: list [m], number [m], own corpus row [m] (2^32 - 1: none), cluster [m], text
                row [m] (these three may be empty), then the positives: offsets [m+1], corpus rows,
                scores.
            params: some of ``skip``, ``last``, ``max_score``, ``margin``, ``percent``,
                ``min_score``, ``near_jaccard`` (0.7), ``rerank_max_score``, ``rerank_margin``,
                ``rerank_percent``, ``pool``, ``k`` (7), ``sample`` (``"top"``, ``"random"``),
                ``refill`` (``"none"``, ``"relax"``, ``"random"``), ``seed``, ``defer`` (shallow
                queries get nothing and are not counted), ``trace``; None switches a rule off.
            rerank: offsets [m+1], ranks and scores of what a call with ``pool`` and without
                this returned, and a score for each positive.
        """
