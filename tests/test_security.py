"""No code out of a file is run, nothing is written beside its folder, and a page shows names without obeying them."""

import ast
import copyreg
import html
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import run_folders
import torch
import yaml
from commands import QUICK, run
from damaged import Harmful, pixels
from PIL import Image
from run_folders import Parsed, hostile_runs, page
from test_fuzz_readers import cifar_files
from test_study_page import hostile as hostile_table
from test_study_page import page as study_page
from test_study_process_page import run as process_record

import saltflat
from saltflat.lab import checkpoints, verdicts_file
from saltflat.lab.study import process_page

SOURCE = Path(saltflat.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


# --- no code is run ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "at"
    run("train", "at", *QUICK, "--optimizer.epochs", "1", "--out", folder)
    return folder


def object_array() -> Any:
    found = np.empty(3, object)
    found[:] = [Harmful()] * 3
    return found


def saved(zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(2, 2), "more": Harmful()}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(0, 5, 4, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def hub(at: Path) -> None:
    """Parquet whose schema says that its labels are of a type that is a pickle."""
    at.mkdir()
    table = pyarrow.table({"img": [{"bytes": png(), "path": "a"}] * 3, "label": [0, 1, 2]})
    meta = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Harmful())}
    fields = [table.schema.field(0), table.schema.field(1).with_metadata(meta)]
    table = table.cast(pyarrow.schema(fields, {b"pandas": pickle.dumps(Harmful())}))
    for split in ("train", "test"):
        pyarrow.parquet.write_table(table, at / f"{split}-0.parquet")


def planted(at: Path, trained: Path) -> dict[str, list[Any]]:
    """Commands that read a file in which there is code."""
    new = ["--out", "new"]
    shutil.copytree(trained, at / "resumed")
    for state in (at / "resumed" / "checkpoints").glob("resume*.pt"):
        state.unlink()
        (at / "state").write_bytes(saved())
        name = f"resume-2-{checkpoints.digest(at / 'state')}.pt"  # so that its checksum is right
        (at / "state").rename(state.with_name(name))
    for number, protocol in enumerate((0, 2, 5)):
        (at / f"batches{number}").mkdir()
        for name, data in cifar_files(False).items():
            (at / f"batches{number}" / name).write_bytes(data)
        (at / f"batches{number}" / "data_batch_3").write_bytes(pickle.dumps({"data": Harmful()}, protocol))
    (at / "zip.pt").write_bytes(saved())
    (at / "legacy.pt").write_bytes(saved(False))
    (at / "plain.pt").write_bytes(pickle.dumps(Harmful()))
    (at / "weights.safetensors").write_bytes(pickle.dumps(Harmful()))
    (at / "images.pickle").write_bytes(pickle.dumps({"data": Harmful(), "extrapolated_targets": [0]}))
    np.savez(at / "four.npz", x_train=object_array(), y_train=[0, 1, 2], x_test=object_array(), y_test=[0, 1, 2])
    np.savez(at / "labels.npz", x_train=pixels(0, 3, 8, 8, 1), y_train=object_array(), x_test=pixels(0, 3, 8, 8, 1),
             y_test=object_array())  # fmt: skip
    np.savez(at / "images.npz", image=object_array(), label=object_array())
    np.savez(at / "inputs.npz", x=object_array(), y=object_array())
    (at / "as.npz").write_bytes(pickle.dumps(Harmful()))
    (at / "call.yaml").write_text(f"- !!python/object/apply:{Harmful.NAME} [harmed]\n")
    (at / "run").mkdir()
    (at / "run" / "config.yaml").write_text(f"seed: !!python/object/apply:{Harmful.NAME} [harmed]\n")
    train = ["train", "at", *QUICK, *new]
    foreign = ["--model", "vgg19-bn", "--eps", "8/255", "--data"]
    return {
        "state to go on from": ["train", "--resume", "resumed"],
        **{f"weights to begin with, {name}": [*train, "--model.initial", name] for name in (
            "zip.pt", "legacy.pt", "plain.pt", "weights.safetensors")},
        **{f"weights of others, {name}": ["evaluate", name, *foreign, "digits"] for name in (
            "zip.pt", "legacy.pt", "plain.pt", "weights.safetensors")},
        "weights in place of a run's": ["evaluate", trained, "--weights", "zip.pt"],
        **{f"CIFAR {i}": [*train, "--data.name", "cifar10", "--data.path", f"batches{i}"] for i in range(3)},
        "pickle of images": ["train", "rst", *QUICK, *new, "--extra.path", "images.pickle"],
        "arrays of objects": [*train, "--data.name", "npz", "--data.path", "four.npz"],
        "labels that are objects": [*train, "--data.name", "npz", "--data.path", "labels.npz"],
        "labelled images that are objects": ["train", "rst", *QUICK, *new, "--extra.path", "images.npz"],
        "images to label": ["label", trained, "images.npz", "--out", "new.npz"],
        "a pickle to label": ["label", trained, "as.npz", "--out", "new.npz"],
        "inputs of others": ["evaluate", "zip.pt", *foreign, "npz", "--data-path", "inputs.npz"],
        "a pickle as inputs": ["evaluate", "zip.pt", *foreign, "npz", "--data-path", "as.npz"],
        "a config": ["report", "run"],
        "a config to go on with": ["train", "--resume", "run"],
        "a listing": ["study", "gap", "--listing", "call.yaml", *new],
        "a change": ["study", "compare", "at", *new, "--set", f"seed=!!python/object/apply:{Harmful.NAME} [harmed]"],
        "a change of a field": [
            "study", "compare", "at", *new, "--set", f"threads=!!python/object/apply:{Harmful.NAME} [harmed]"],
    }  # fmt: skip


def test_the_payload_works_where_it_is_let(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Harmful()))
    assert (tmp_path / "harmed").is_dir()


def test_no_command_runs_what_is_in_a_file(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, words in planted(tmp_path, trained).items():
        with pytest.raises(SystemExit) as stop:
            run(*words)
        printed = capsys.readouterr().err
        assert (stop.value.code, printed.count("\n")) == (2, 1), (name, printed)
        assert not (tmp_path / "harmed").exists(), name
        assert not (tmp_path / "new").exists(), name


def test_types_of_arrow_are_not_made_of_pickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub(tmp_path / "hub")
    assert len(saltflat.data.parquet(tmp_path / "hub").train) == 3
    assert not (tmp_path / "harmed").exists()


def test_findings_that_are_gone_on_from_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / "a.part", "wb") as file:
        np.savez(file, label=object_array(), reached=object_array(), clean_by=object_array())
    with pytest.raises(ValueError, match="delete it to begin anew"):
        verdicts_file.read(tmp_path / "a.part", ["clean"], torch.zeros(3))
    assert not (tmp_path / "harmed").exists()


# --- nothing in the source could ---


def name_of(node: ast.AST) -> str:
    """np.load -> "np.load" """
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def calls(path: Path) -> list[tuple[str, dict[str, ast.expr], ast.Call]]:
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(name_of(call.func), {word.arg or "": word.value for word in call.keywords}, call) for call in found]


def is_true(words: dict[str, ast.expr], name: str) -> bool:
    value = words.get(name)
    return isinstance(value, ast.Constant) and value.value is True


RESTRICTED = SOURCE / "data" / "pickles.py"  # its reader looks every name up in a table of seven
MESSAGES = SOURCE / "parallel.py"  # what one process of a job tells the others, never a file's
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "runpy.run_path",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "shelve.open", "dill.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "pandas.read_pickle",
    "shutil.unpack_archive", "tempfile.mktemp", "urllib.request.urlretrieve", "torch.hub.load", "torch.jit.load",
    "torch.package.PackageImporter",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_of_the_source_reads_code(path):
    for name, words, call in calls(path):
        where = f"{path.name}:{call.lineno}: {name}"
        if path not in (RESTRICTED, MESSAGES):
            assert name not in FORBIDDEN, where
            assert not name.endswith("Unpickler"), where
        last = name.rpartition(".")[2]
        assert last not in ("extractall", "unpack_archive", "set_default_mmap_options"), where
        assert last != "extract", where
        if name == "torch.load":
            assert is_true(words, "weights_only"), where
        if name in ("np.load", "numpy.load", "read_array"):
            assert isinstance(words.get("allow_pickle", ast.Constant(False)), ast.Constant), where
            assert not is_true(words, "allow_pickle"), where
        if name.startswith("subprocess."):
            assert "shell" not in words, where
            assert isinstance(call.args[0], ast.List), where
        if name == "jinja2.Environment":
            assert is_true(words, "autoescape"), where
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and path not in (RESTRICTED, MESSAGES):
            brought = {f"{node.module}.{alias.name}" for alias in node.names}
            assert not brought & FORBIDDEN, path
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not modules & {"marshal", "shelve", "dill", "joblib", "cloudpickle", "runpy"}, path
            assert "pickle" not in modules or path in (RESTRICTED, MESSAGES), path
    loaders = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    for loader in loaders:
        bases = {name_of(base) for base in loader.bases}
        assert not {base for base in bases if base.startswith("yaml.")} - {"yaml.SafeLoader"}, path


def test_messages_between_processes_come_from_no_file():
    names = [name for name, _, _ in calls(MESSAGES)]
    assert names.count("pickle.loads") == 1
    assert not {"open", "torch.load", "np.load"} & set(names)
    assert not [name for name in names if name.endswith(("read_bytes", "read_text"))]


def test_the_restricted_reader_looks_every_name_up_in_its_table():
    assert len(saltflat.data.pickles._STAND_INS) == 7
    for module, name in (("os", "system"), ("builtins", "eval"), ("numpy", "load"), ("copyreg", "_reconstructor")):
        data = f"c{module}\n{name}\n.".encode()
        with pytest.raises(ValueError, match="refused, the pickle names"):
            saltflat.data.pickles.load(data, "a")
    assert not copyreg._extension_registry  # what a pickle names by number


ESCAPING = {
    "a parent": "../../escaped/data_batch_1",
    "from the root": "/tmp/escaped/data_batch_1",
    "a drive": "C:\\escaped\\data_batch_1",
}


@pytest.mark.parametrize("kind", ["file", "link", "hard link", "device", "pipe"])
@pytest.mark.parametrize("name", ESCAPING)
def test_archives_are_read_and_nothing_in_them_is_written(kind, name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    monkeypatch.chdir(tmp_path / "here")
    with tarfile.open("a.tar", "w") as archive:
        member = tarfile.TarInfo(ESCAPING[name])
        data = cifar_files(False)["data_batch_1"]
        types = {
            "link": tarfile.SYMTYPE,
            "hard link": tarfile.LNKTYPE,
            "device": tarfile.CHRTYPE,
            "pipe": tarfile.FIFOTYPE,
        }
        if kind == "file":
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        else:
            member.type, member.linkname = types[kind], "../secret"
            archive.addfile(member)
    with pytest.raises(ValueError, match=r"missing|holds neither"):
        saltflat.data.cifar10("a.tar")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "here", "secret"]
    assert not Path("/tmp/escaped").exists()


# --- pages show names, and do not obey them ---

TURNING = "\u202egnp.exe\u2066\u200f"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{7*7}}{% raw %}{# no #}${7*7}",
    "</style><style>*{display:none}</style>",
    "</script><script>alert(1)</script>",
    "</title></svg></td></table><iframe src=//a>",
    "<!-- --><![CDATA[ ]]> -->",
    "javascript:alert(1) &lt;b&gt; &#60;b&#62; &quot;",
    f"turned{TURNING}around",
    "a\x00b\x1b[2J\x85c\u2028d\ud800e",
]
HARMLESS = str.maketrans(dict.fromkeys("<>\"'&{}%$#\x00\x1b\x85\u2028�\u202e\u2066\u200f", "x"))


def shape(text: str) -> set[tuple[str, str]]:
    """Elements with each of their attributes, and where attributes lead."""

    class Shape(Parsed):
        def handle_starttag(self, tag, attributes):
            found.add((tag, ""))
            for name, value in attributes:
                leads = value if name in ("href", "src", "action", "style", "http-equiv", "type") or ":" in name else ""
                found.add((tag, f"{name} {leads}" if tag not in ("path", "use", "g", "text", "line") else name))

    found: set[tuple[str, str]] = set()
    Shape(text)
    return found


def of_runs(words: str, at: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(run_folders, "HOSTILE", words)
    return page(hostile_runs(at))


def of_study(words: str, at: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setattr("test_study_page.HOSTILE", words)
    at.mkdir()
    return study_page(hostile_table(), at)


def of_process(words: str, at: Path, patch: pytest.MonkeyPatch) -> str:
    def spoilt(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {name: spoilt(value) if name not in ("name", "role") else value for name, value in tree.items()}
        if isinstance(tree, list):
            return [spoilt(value) for value in tree]
        return words if isinstance(tree, str) else tree

    at.mkdir()
    process_page.write(json.loads(json.dumps(spoilt(process_record()))), at)
    return (at / "process.html").read_text(encoding="utf-8")


PAGES = {"runs": of_runs, "study": of_study, "process": of_process}


@pytest.mark.parametrize("kind", PAGES)
def test_names_add_no_element_and_no_attribute(kind, tmp_path, monkeypatch):
    words = " ".join(HOSTILE if kind != "process" else HOSTILE[:3])  # it cuts what is long bit by bit
    hostile = PAGES[kind](words, tmp_path / "hostile", monkeypatch)
    harmless = PAGES[kind](words.translate(HARMLESS), tmp_path / "harmless", monkeypatch)
    assert shape(hostile) <= shape(harmless)
    for tag in ("<script", "<style", "<meta", "<link", "<title", "<!--"):
        assert hostile.count(tag) == harmless.count(tag), tag
    assert hostile.count("<svg") == harmless.count("<svg") > 0
    assert ("{{7*7}}" in html.unescape(hostile)) == ("{{7*7}}" in words)
    assert not set(TURNING) & set(hostile) - set("gnp.exe")  # nor is the writing turned around


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_each_alone_adds_none(number, tmp_path, monkeypatch):
    """One might undo the other."""
    words = HOSTILE[number]
    hostile = of_runs(words, tmp_path / "hostile", monkeypatch)
    harmless = of_runs(words.translate(HARMLESS), tmp_path / "harmless", monkeypatch)
    assert shape(hostile) <= shape(harmless)


def test_the_data_of_a_surface_are_json_that_no_name_ends(tmp_path, monkeypatch):
    text = of_runs("</script><!--<script>", tmp_path / "hostile", monkeypatch)
    start = text.index('<script type="application/json" id="plane-')
    island = text[text.index(">", start) + 1 : text.index("</script>", start)]
    assert "</script><!--<script>" in json.loads(island)["runs"][0]["name"]
    assert not set("<>&") & set(island)


def test_a_page_may_run_its_own_script_alone(tmp_path, monkeypatch):
    text = of_runs(HOSTILE[0], tmp_path / "hostile", monkeypatch)
    (policy,) = [value for name, value in Parsed(text).attributes if name == "content" and value and "default" in value]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert text.index("Content-Security-Policy") < text.index("<style") < text.index("<script")


def test_every_template_escapes():
    templates = sorted(SOURCE.rglob("*.j2"))
    assert len(templates) >= 5
    for template in templates:
        text = template.read_text()
        assert "autoescape" not in text
        assert text.replace("{{ policy|safe }}", "").count("safe }}") == 0, template
        assert "|tojson" not in text


def test_what_is_written_for_others_holds_names_as_text(trained, tmp_path):
    """The header of a model card is YAML: a title of several lines adds no field to it."""
    run("export", trained, "--out", tmp_path / "hub", "--title", "a\n---\nlicense: mit\n", "--licence", "x\ntags: [a]")
    card = (tmp_path / "hub" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "x\ntags: [a]"
