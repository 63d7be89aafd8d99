"""Make the demo's text from Debian's archive: `python make.py [OUT]`.

Inputs, all through apt as this machine has it configured: the Packages and Translation-en
indexes of the stable suite's main component, and the package `wordnet-base`. The same archive
snapshot gives the same rows: every choice is a hash of a name, never a random generator.
Needs apt-get, dpkg-deb and the Python package `zstandard`; touches nothing outside a temporary
folder and OUT (by default `data/` beside this file), and needs no root.

Splits: a *source package* belongs wholly to train, dev or test, and so does a WordNet synset,
so no evaluation text comes from a package or a synset that was trained on. Source packages do
share boilerplate, so exact and near copies across the splits remain, as in any real crawl:
finding them is the job of `embkit dedup`.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

Row = dict[str, Any]

DEV_SHARE, TEST_SHARE = 0.065, 0.10  # of the source packages
WORDNET_DEV_SHARE, WORDNET_TEST_SHARE = 0.09, 0.12  # of the synsets
TRAIN_RETRIEVAL, DEV_RETRIEVAL, TEST_RETRIEVAL = 28_000, 1_500, 3_000
TRAIN_CLASSES, DEV_CLASSES, TEST_CLASSES = 190, 45, 60  # most rows of one label
LABEL_MINIMUM = 150  # a section needs that many packages to be a label
TRAIN_GRADE, EVAL_GRADE = 2_000, 250  # sentence pairs of one grade
PASSAGE_CHARS, CLASS_CHARS, MIN_CHARS = 360, 240, 40

# Sections that say how a package is used or built rather than what it is about.
CATCH_ALL = {
    "debug", "devel", "doc", "introspection", "libdevel", "libs", "localization",
    "metapackages", "misc", "oldlibs", "tasks", "utils",
}  # fmt: skip

GRADES = {
    5: "a usage example and the definition of the same synset",
    4: "two usage examples of one synset",
    3: "definitions of a synset and its direct hypernym, or of two similar-to adjectives",
    2: "definitions of two sisters, synsets that share their direct hypernym",
    1: "two synsets of one lexicographer file (such as noun.animal), not related as above",
    0: "two synsets of two lexicographer files",
}


def fraction(name: str, *, salt: str) -> float:
    """Map a name to [0, 1) by a hash; `salt` makes independent draws of one name."""
    digest = hashlib.blake2b(f"{salt}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(name: str, *, dev: float, test: float, salt: str) -> str:
    """Return "test", "dev" or "train", the same for a name for ever."""
    x = fraction(name, salt=salt)
    return "test" if x < test else "dev" if x < test + dev else "train"


def sample(rows: Iterable[Row], count: int, *, key: Callable[[Row], str], salt: str) -> list[Row]:
    """Return the `count` rows with the lowest hash of `key`, in order of that hash."""
    return sorted(rows, key=lambda r: (fraction(key(r), salt=salt), key(r)))[:count]


# -- Debian ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Package:
    """A binary package: its names, section, short and long description (by paragraph)."""

    name: str
    source: str
    section: str
    title: str
    paragraphs: tuple[str, ...]

    def text(self, limit: int) -> str:
        """Return the first two paragraphs, cut at a word to at most `limit` characters."""
        text = " ".join(self.paragraphs[:2])
        if len(text) <= limit:
            return text
        return text[: limit + 1].rsplit(" ", 1)[0].rstrip(" ,;:-")


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What apt gave: packages, WordNet's dictionary folder, and the provenance to print."""

    packages: list[Package]
    wordnet: Path
    licence: str
    facts: dict[str, str]


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """Yield the deb822 stanzas of an index; continuation lines keep their leading space."""
    current: dict[str, str] = {}
    key = ""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            line = line.rstrip("\n")
            if not line:
                if current:
                    yield current
                current, key = {}, ""
            elif line[0] in " \t":
                current[key] += "\n" + line
            else:
                key, _, value = line.partition(":")
                current[key] = value.strip()
    if current:
        yield current


def paragraphs_of(description: str) -> tuple[str, tuple[str, ...]]:
    """Split a Description field into the short one and the paragraphs of the long one."""
    title, *lines = description.split("\n")
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == ".":
            paragraphs.append([])
        else:
            paragraphs[-1].append(line.strip())
    joined = (re.sub(r"\s+", " ", " ".join(p)).strip() for p in paragraphs)
    return title.strip(), tuple(p for p in joined if p)


def fetch(work: Path) -> Archive:
    """Fetch the indexes and `wordnet-base` with apt into `work` and read them."""
    for name in ("lists/partial", "cache/archives/partial", "wordnet"):
        (work / name).mkdir(parents=True)
    options = [
        f"Dir::State::Lists={work / 'lists'}", f"Dir::Cache={work / 'cache'}",
        "Acquire::Languages=en", "Acquire::GzipIndexes=false",
        "Acquire::IndexTargets::deb::Translations::DefaultEnabled=true",
        "APT::Sandbox::User=", "Debug::NoLocking=1",
    ]  # fmt: skip
    flags = [part for option in options for part in ("-o", option)]

    def apt(*command: str, cwd: Path = work) -> str:
        done = subprocess.run(
            ["apt-get", *flags, *command], cwd=cwd, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    apt("update", "-q")

    def index(created_by: str, *more: str) -> tuple[Path, dict[str, str]]:
        wanted = [f"Created-By: {created_by}", "Origin: Debian", "Component: main", *more]
        for block in apt("indextargets", *wanted).split("\n\n"):
            entry = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
            # Updates and security repeat packages of the release; one snapshot is enough.
            if entry and entry.get("Suite") == entry["Suite"].split("-")[0] != "unstable":
                return Path(entry["Filename"]), entry
        raise SystemExit(f"apt offers no {created_by} index of Debian main; see sources.list(5)")

    packages_path, target = index("Packages")
    english_path, _ = index("Translations", "Language: en")
    release = next((work / "lists").glob(f"*_dists_{target['Codename']}_InRelease"))
    head = dict(
        line.split(": ", 1)
        for line in release.read_text(encoding="utf-8").splitlines()[:40]
        if re.match(r"[A-Z][A-Za-z-]+: ", line)
    )
    english = {s["Description-md5"]: s["Description-en"] for s in stanzas(english_path)}
    packages = []
    for stanza in stanzas(packages_path):
        description = english.get(stanza.get("Description-md5", ""))
        if description is None:
            continue
        title, paragraphs = paragraphs_of(description)
        packages.append(
            Package(
                name=stanza["Package"],
                source=stanza.get("Source", stanza["Package"]).split(" ")[0],
                section=stanza.get("Section", ""),
                title=title,
                paragraphs=paragraphs,
            )
        )
    apt("download", "-q", "wordnet-base", cwd=work / "wordnet")
    (deb,) = (work / "wordnet").glob("wordnet-base_*.deb")
    subprocess.run(["dpkg-deb", "-x", str(deb), str(work / "wordnet/root")], check=True)
    root = work / "wordnet/root/usr/share"
    version = subprocess.run(
        ["dpkg-deb", "-f", str(deb), "Version"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    facts = {
        "Suite": f"{head['Codename']} {head.get('Version', '')}, component main, "
        f"architecture {target['Architecture']}",
        "Release date": head["Date"],
        "Packages": f"{len(packages):,} binary packages with an English description",
        "Packages index SHA-256": hashlib.sha256(packages_path.read_bytes()).hexdigest(),
        "Translation-en index SHA-256": hashlib.sha256(english_path.read_bytes()).hexdigest(),
        "wordnet-base": f"version {version}, "
        f"SHA-256 {hashlib.sha256(deb.read_bytes()).hexdigest()}",
    }
    return Archive(
        packages=packages,
        wordnet=root / "wordnet",
        licence=(root / "doc/wordnet-base/copyright").read_text(encoding="utf-8"),
        facts=facts,
    )


def usable(packages: list[Package]) -> dict[str, list[Package]]:
    """Return by split one package for each first paragraph of each source package.

    A source package's binaries mostly share it (library, headers, documentation), so the others
    would be the same text under another title. Copies between source packages stay.
    """
    splits: dict[str, list[Package]] = {"train": [], "dev": [], "test": []}
    seen: set[tuple[str, str]] = set()
    order = sorted(packages, key=lambda p: (p.source, p.name != p.source, p.name))
    for package in order:
        if not package.paragraphs or len(package.paragraphs[0]) < MIN_CHARS:
            continue
        if len(package.title) < 8 or re.search(r"transitional|dummy", package.title, re.I):
            continue
        key = (package.source, package.paragraphs[0])
        if key not in seen:
            seen.add(key)
            split = split_of(package.source, dev=DEV_SHARE, test=TEST_SHARE, salt="source")
            splits[split].append(package)
    return splits


def retrieval(packages: list[Package], count: int) -> list[Package]:
    """Draw `count` packages and put them in the archive's order (neighbours compress well)."""
    rows = [{"p": p} for p in packages]
    drawn = sample(rows, count, key=lambda r: r["p"].name, salt="retrieval")
    return sorted((r["p"] for r in drawn), key=lambda p: (p.source, p.name))


def judged(packages: list[Package]) -> dict[str, list[Row]]:
    """Return corpus, queries and qrels; a query is answered by every passage of equal text."""
    by_text: dict[str, list[str]] = defaultdict(list)
    for p in packages:
        by_text[p.text(PASSAGE_CHARS)].append(p.name)
    return {
        "corpus": [{"_id": p.name, "title": "", "text": p.text(PASSAGE_CHARS)} for p in packages],
        "queries": [{"_id": p.name, "text": p.title} for p in packages],
        "qrels": [
            {"query_id": p.name, "corpus_id": name, "score": 1}
            for p in packages
            for name in by_text[p.text(PASSAGE_CHARS)]
        ],
    }


def classes(packages: list[Package], labels: set[str], count: int) -> list[Row]:
    """Draw at most `count` packages of each label as {text, label}, in the archive's order."""
    by_label: dict[str, list[Row]] = defaultdict(list)
    for p in packages:
        if p.section in labels:
            by_label[p.section].append({"p": p})
    drawn = [
        r["p"]
        for label in sorted(labels)
        for r in sample(by_label[label], count, key=lambda r: r["p"].name, salt="class")
    ]
    drawn.sort(key=lambda p: (p.source, p.name))
    return [{"text": p.text(CLASS_CHARS), "label": p.section} for p in drawn]


# -- WordNet -----------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Synset:
    """One line of a WordNet data file (wndb(5))."""

    id: str
    file: str
    lemmas: list[str]
    definition: str
    usages: list[str]
    hypernyms: list[str] = field(default_factory=list)
    similar: list[str] = field(default_factory=list)

    @property
    def gloss(self) -> str:
        """Return "lemma, lemma: definition", the form in which a definition is used."""
        return f"{', '.join(self.lemmas[:3])}: {self.definition}"


def synsets(folder: Path) -> dict[str, Synset]:
    """Read WordNet's four data files; ids are the part of speech and the offset."""
    found: dict[str, Synset] = {}
    for part, suffix in (("n", "noun"), ("v", "verb"), ("a", "adj"), ("r", "adv")):
        for line in (folder / f"data.{suffix}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence, which heads each file
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            words = int(fields[3], 16)
            lemmas = [fields[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(words)]
            start = 4 + 2 * words
            pointers = [
                fields[start + 1 + 4 * i : start + 5 + 4 * i] for i in range(int(fields[start]))
            ]
            usages = [u.strip() for u in re.findall(r'"([^"]+)"', gloss)]
            definition = re.split(r';\s*"|^"', gloss.strip())[0].strip(" ;")
            synset = Synset(
                id=part + fields[0],
                file=fields[1],
                lemmas=lemmas,
                definition=definition,
                usages=[u for u in usages if len(u) >= 12],
            )
            for symbol, offset, pos, _ in pointers:
                target = ("a" if pos == "s" else pos) + offset
                if symbol in ("@", "@i"):
                    synset.hypernyms.append(target)
                elif symbol == "&":
                    synset.similar.append(target)
            if len(definition) >= 12:
                found[synset.id] = synset
    return found


def graded(members: list[Synset], count: int) -> list[Row]:
    """Return about `count` {sentence1, sentence2, score} of each grade of GRADES.

    Both synsets of a pair are members. A synset starts at most one pair of a grade, so that
    large families do not fill the sample.
    """
    by_id = {s.id: s for s in members}
    children: dict[str, list[Synset]] = defaultdict(list)
    by_file: dict[str, list[Synset]] = defaultdict(list)
    for s in members:
        by_file[s.file].append(s)
        for parent in s.hypernyms:
            children[parent].append(s)

    def pick(
        options: list[Synset], s: Synset, salt: str, fits: Callable[[Synset], bool] = bool
    ) -> Synset | None:
        # A bounded number of draws: the list can be a whole lexicographer file.
        for attempt in range(8 if options else 0):
            x = fraction(s.id, salt=f"{salt}{attempt}")
            other = options[int(x * len(options))]
            if other is not s and fits(other):
                return other
        return None

    def related(a: Synset, b: Synset) -> bool:
        near = {*a.hypernyms, *a.similar, a.id}
        return bool(
            b.id in near or a.id in {*b.hypernyms, *b.similar} or near & {*b.hypernyms, *b.similar}
        )

    # By grade and form; a grade's rows are drawn from its forms in equal parts.
    pairs: dict[int, dict[str, list[Row]]] = {g: defaultdict(list) for g in sorted(GRADES)}

    def add(grade: int, s: Synset, other: Synset, form: str) -> None:
        one = s.gloss if form == "glosses" else s.usages[0]
        two = other.gloss if form != "usages" else other.usages[-1 if other is s else 0]
        swap = fraction(s.id, salt=f"swap{grade}") < 0.5
        first, second = (two, one) if swap else (one, two)
        pairs[grade][form].append({"id": s.id, "sentence1": first, "sentence2": second})

    def add_any_form(grade: int, s: Synset, family: list[Synset]) -> None:
        # Grades 0 and 1 come in every form, or the form alone would tell the grade.
        form = ("glosses", "usages", "both")[int(3 * fraction(s.id, salt=f"form{grade}"))]
        if form != "glosses" and not s.usages:
            form = "glosses"
        other = pick(family, s, f"other{grade}", lambda o: form != "usages" or bool(o.usages))
        if other and (other.file != s.file if grade == 0 else not related(s, other)):
            add(grade, s, other, form)

    for s in members:
        if s.usages:
            add(5, s, s, "both")
        if len(s.usages) > 1:
            add(4, s, s, "usages")
        near = [by_id[i] for i in (*s.hypernyms, *s.similar) if i in by_id]
        if other := pick(near, s, "near"):
            add(3, s, other, "glosses")
        sisters = [c for parent in s.hypernyms[:1] for c in children[parent]]
        other = pick(sisters, s, "sister")
        if other and other.id not in {*s.hypernyms, *s.similar}:
            add(2, s, other, "glosses")
        add_any_form(1, s, by_file[s.file])
        add_any_form(0, s, members)
    drawn = [
        {**row, "score": float(grade)}
        for grade, forms in pairs.items()
        for form, rows in sorted(forms.items())
        for row in sample(rows, count // len(forms), key=lambda r: r["id"], salt=f"{grade}{form}")
    ]
    drawn.sort(key=lambda r: (r["id"], r["score"]))
    return [{k: r[k] for k in ("sentence1", "sentence2", "score")} for r in drawn]


# -- Output ------------------------------------------------------------------------------------


def write(path: Path, rows: list[Row]) -> str:
    """Write JSON lines compressed with zstd -19 and return this file's line of the README."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress("".join(lines).encode()))
    return f"{len(rows):,} | {path.stat().st_size:,}"


README = """\
# Demo data

Real English text for `embkit demo`: {total:,} bytes compressed. Made by `make.py` in the folder
above from Debian's archive and nothing else. Nothing is planted: the copies, near copies and
boilerplate in it are the archive's own. To remake it from the archive as it is today (the
same snapshot gives the same rows):

```
python python/embkit/demo/make.py
```

## Files

JSON lines, zstandard. Columns: retrieval `query, positive`; similarity `sentence1, sentence2,
score` (0-5); classification `text, label`; corpus `_id, title, text`; queries `_id, text`; qrels
`query_id, corpus_id, score`.

| file | rows | bytes |
|---|---|---|
{files}

- **Retrieval**: a package's short description -> the first two paragraphs of its long one, at
  most {passage} characters. One package for each first paragraph of a source package. Qrels list
  every package whose passage has the identical text. Dev and test are drawn apart from train by
  source package.
- **Classification**: the long description, at most {klass} characters -> archive section
  ({n_labels} sections that name a topic and have at least {minimum} packages):
  {labels}.
  The training rows are packages that are not in the retrieval training rows; `dev` and `test` each
  have their own rows to fit a classifier on (`train`) and to score it (`test`).
- **Similarity**: WordNet texts graded by relation; both synsets of a pair are in one split. The
  grades are relations, not human judgements:

| score | pair |
|---|---|
{grades}

A definition is written "lemma, lemma: definition" with at most three lemmas. Pairs
of grades 0 and 1 are in equal parts two definitions, two usage examples, and one of each, so
that the form alone does not tell the grade.

## Provenance

| what | snapshot |
|---|---|
{facts}

## Licence

**Package descriptions** are part of Debian main: each is free under the Debian Free Software
Guidelines, by the licence of its source package (mostly GPL, MIT, BSD and Apache; see
`/usr/share/doc/PACKAGE/copyright` on a Debian system, PACKAGE being the `_id` of a row). The
selection is by the embkit project, which claims no rights in it.

**WordNet** texts are from WordNet 3.0, modified only by selection and pairing, under the licence
below, given as Debian's `wordnet-base` ships it:

```
{licence}
```
"""


def make(archive: Archive, out: Path) -> None:
    """Write the data folder and its README to `out`."""
    splits = usable(archive.packages)
    files: dict[str, str] = {}

    def put(name: str, rows: list[Row]) -> None:
        files[name] = write(out / name, rows)

    pairs = retrieval(splits["train"], TRAIN_RETRIEVAL)
    put(
        "train/retrieval.jsonl.zst",
        [{"query": p.title, "positive": p.text(PASSAGE_CHARS)} for p in pairs],
    )
    sections = Counter(p.section for part in splits.values() for p in part)
    labels = {s for s, n in sections.items() if n >= LABEL_MINIMUM and s not in CATCH_ALL}
    taken = {p.name for p in pairs}
    rest = [p for p in splits["train"] if p.name not in taken]
    put("train/classification.jsonl.zst", classes(rest, labels, TRAIN_CLASSES))
    families: dict[str, list[Synset]] = {"train": [], "dev": [], "test": []}
    for synset in synsets(archive.wordnet).values():
        split = split_of(synset.id, dev=WORDNET_DEV_SHARE, test=WORDNET_TEST_SHARE, salt="synset")
        families[split].append(synset)
    put("train/sts.jsonl.zst", graded(families["train"], TRAIN_GRADE))
    sizes = {"dev": (DEV_RETRIEVAL, DEV_CLASSES), "test": (TEST_RETRIEVAL, TEST_CLASSES)}
    for split, (queries, per_label) in sizes.items():
        for name, rows in judged(retrieval(splits[split], queries)).items():
            put(f"{split}/retrieval/debian/{name}.jsonl.zst", rows)
        for part in ("train", "test"):
            half = [
                p
                for p in splits[split]
                if (fraction(p.source, salt="fit") < 0.5) == (part == "train")
            ]
            name = f"{split}/classification/sections/{part}.jsonl.zst"
            put(name, classes(half, labels, per_label))
        put(f"{split}/sts/wordnet.jsonl.zst", graded(families[split], EVAL_GRADE))
    total = sum((out / name).stat().st_size for name in files)
    (out / "README.md").write_text(
        README.format(
            total=total,
            files="\n".join(f"| {name} | {line} |" for name, line in sorted(files.items())),
            passage=PASSAGE_CHARS,
            klass=CLASS_CHARS,
            n_labels=len(labels),
            minimum=LABEL_MINIMUM,
            labels=textwrap.fill(", ".join(sorted(labels)), 95, subsequent_indent="  "),
            grades="\n".join(f"| {g} | {text} |" for g, text in sorted(GRADES.items())),
            facts="\n".join(f"| {k} | {v} |" for k, v in archive.facts.items()),
            licence=archive.licence.strip(),
        ),
        encoding="utf-8",
    )
    print(f"{out}: {len(files)} files, {total:,} bytes")


def main() -> None:
    """Fetch from the archive and write the folder named on the command line."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    with tempfile.TemporaryDirectory() as work:
        make(fetch(Path(work)), out)


if __name__ == "__main__":
    main()
