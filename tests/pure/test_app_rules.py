"""An app before it runs: what may be registered, what is said of everything else, how a module is found."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec
import pytest
from support import ROOT, settings

from server.app import Allow, App, AppError, Change, Client, Disconnect, Refuse, Server, Welcome, load
from server.changes import Changes, files_of
from server.channels import Channels
from server.errors import Refused
from server.hooks import KINDS, encoded


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


SPACES = ("", "chat", "live")


class Point(msgspec.Struct):
    """A payload as a Struct."""

    x: int


@dataclasses.dataclass
class Spot:
    """A payload as a dataclass."""

    x: int


class Place(TypedDict):
    """A payload as a TypedDict."""

    x: int


class Card(msgspec.Struct):
    """A payload with few possible values."""

    suit: Literal["hearts", "spades"]


class Opaque:
    """Nothing that could come out of JSON."""


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def _faults(*registrations: Callable[[App], object]) -> list[str]:
    app = App()
    for register in registrations:
        register(app)
    with pytest.raises(AppError) as caught:
        app.check(Channels(settings().channel), SPACES)
    return str(caught.value).splitlines()


# --- signatures -----------------------------------------------------------------
def test_every_kind_of_hook_may_be_registered() -> None:
    """Each decorator takes a proper function and gives it back as it is; namespaces have hooks of their own."""
    app = App()

    @app.connecting
    async def connecting(client: Client, data: Point) -> Welcome | None: ...
    @app.subscribing
    async def subscribing(client: Client, channel: str, data: Any) -> Allow | None: ...
    @app.subscribing("chat")
    async def subscribing_chat(client: Client, channel: str) -> None: ...
    @app.publishing
    async def publishing(client: Client, channel: str, data: dict[str, int] | None) -> Change | None: ...
    @app.publishing("live")
    async def publishing_live(client: Client, channel: str, data: bytes) -> Change | None: ...
    @app.leaving
    async def leaving(client: Client, channel: str) -> None: ...
    @app.disconnecting
    async def disconnecting(client: Client) -> None: ...
    @app.rpc
    async def roll(client: Client, data: Spot) -> int: ...
    @app.rpc("deal cards")
    async def deal(client, data): ...  # type: ignore[no-untyped-def]  # that is the point
    @app.starting
    async def starting() -> None: ...
    @app.stopping
    async def stopping() -> None: ...

    app.check(Channels(settings().channel), SPACES)
    assert [app.find(kind).function for kind in ("connecting", "disconnecting", "starting")] == [  # type: ignore[union-attr]
        connecting,
        disconnecting,
        starting,
    ]
    assert str(app.find("subscribing", "chat")).startswith("<Hook subscribing 'chat' ")
    assert str(app.find("subscribing", "live")).startswith("<Hook subscribing test_every")
    assert app.find("rpc", "deal cards") is not None
    assert app.find("rpc", "deal") is None


async def _no_parameters() -> None: ...
async def _too_many(client: Client, channel: str, data: Any, more: int) -> None: ...
async def _keyword_only(client: Client, *, channel: str, data: Any) -> None: ...
async def _wrong_channel(client: Client, channel: int, data: Any) -> None: ...
async def _wrong_client(client: str, channel: str, data: Any) -> None: ...
async def _wrong_answer(client: Client, channel: str, data: Any) -> Allow: ...  # type: ignore[empty-body]
async def _opaque(client: Client, channel: str, data: list[Opaque]) -> None: ...
async def _unknown_type(client: Client, channel: str, data: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821
async def _no_channel(client: Client, data: Any) -> None: ...
async def _turned_round(channel: Any, client: Any) -> None: ...
def _waits_not(client: Client, channel: str, data: Any) -> None: ...


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (_no_parameters, "expected the parameters (client, channel, data), got () -> None"),
        (_too_many, "expected the parameters (client, channel, data)"),
        (_keyword_only, "expected the parameters (client, channel, data)"),
        (_no_channel, "expected channel in place of data: the parameters are (client, channel, data)"),
        (_turned_round, "expected client in place of channel"),
        (_wrong_channel, "expected channel to be a str, got int"),
        (_wrong_client, "expected client to be a Client, got str"),
        (_wrong_answer, "expected it to return Change or None, got Allow"),
        (_opaque, "the type of data cannot be checked: expected a msgspec Struct"),
        (_unknown_type, "its annotations cannot be resolved: name 'Nowhere' is not defined"),
        (_waits_not, "expected async def _waits_not(client, channel, data)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_signature_is_said_at_start(function: Any, expected: str) -> None:
    """The fault names the file, the line, the function, the event, what was expected and what came."""
    (fault,) = _faults(lambda app: app.publishing(function))
    assert fault.startswith(f"{__file__}:{function.__code__.co_firstlineno}: {function.__qualname__} (publishing): ")
    assert expected in fault


def test_names_of_parameters_are_the_users_own() -> None:
    """A procedure may call its data "channel", since it gets no channel that could be meant."""
    app = App()

    @app.rpc
    async def enter(client: Client, channel: str) -> None: ...
    @app.leaving
    async def leaving(whoever: Client, /, where: str) -> None: ...

    app.check(Channels(settings().channel), SPACES)


def test_what_is_no_hook_is_named_with_what_is() -> None:
    """A misspelt decorator and one with a stray argument say what to write, where they stand."""
    app = App()
    with pytest.raises(AttributeError, match=r"no 'publish'; what it has is @app\.connecting, .*@app\.publishing"):
        app.publish  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(
        TypeError, match=r"expected @app\.connecting above an async def, without parentheses, got 'chat'"
    ):
        app.connecting("chat")  # type: ignore[type-var]


def test_all_faults_are_said_together() -> None:
    """Two hooks for one event, a procedure twice, a built-in one, an unknown namespace: each is named, all at once."""

    async def one(client: Client) -> None: ...
    async def other(client: Client) -> None: ...
    async def chat(client: Client, channel: str) -> None: ...

    faults = _faults(
        lambda app: app.disconnecting(one),
        lambda app: app.disconnecting(other),
        lambda app: app.rpc("draw")(one),
        lambda app: app.rpc("draw")(other),
        lambda app: app.rpc("publish")(one),
        lambda app: app.leaving("chta")(chat),
        lambda app: app.leaving("chat")(chat),
    )
    assert len(faults) == 4
    for name, fault, words in zip(
        ("other", "other", "one", "chat"),
        faults,
        (
            f"there is one already: {one.__qualname__} at {__file__}:",
            f"there is one already: {one.__qualname__} at {__file__}:",
            "the server answers this method itself",
            "no entry of channel.namespaces is named 'chta'",
        ),
        strict=True,
    ):
        assert fault.startswith(f"{__file__}:")
        assert f".{name} (" in fault
        assert words in fault


# --- payloads ----------------------------------------------------------------------
@pytest.mark.parametrize("kind", [Point, Spot, Place, dict[str, int], Point | None])
def test_declared_payloads_are_checked(kind: Any) -> None:
    """Struct, dataclass, TypedDict and plain types: what fits becomes a value, what does not is refused with 107."""
    app = App()

    async def move(client: Client, data: Any) -> None: ...

    move.__annotations__["data"] = kind
    app.rpc(move)
    hook = app.find("rpc", "move")
    assert hook is not None
    (value,) = hook.payload(b'{"x": 1}')
    assert (value["x"] if isinstance(value, dict) else value.x) == 1
    for bad in (b'{"x": "one"}', b"[]", b'{"x": 1', b"\xff", b"[" * 100_000):
        with pytest.raises(Refused, match=r"107 bad request: data for .*move at"):
            hook.payload(bad)


def test_no_data_is_null() -> None:
    """A command without data gives ``None`` to whom that suits, and is refused otherwise; bytes are as they came."""
    app = App()

    @app.rpc
    async def anything(client: Client, data: Any) -> None: ...
    @app.rpc
    async def point(client: Client, data: Point) -> None: ...
    @app.rpc
    async def raw(client: Client, data: bytes) -> None: ...

    hooks = {name: app.find("rpc", name) for name in ("anything", "point", "raw")}
    assert hooks["anything"].payload(None) == (None,)  # type: ignore[union-attr]
    assert hooks["raw"].payload(b"\xff\x00") == (b"\xff\x00",)  # type: ignore[union-attr]
    with pytest.raises(Refused, match="107"):
        hooks["point"].payload(None)  # type: ignore[union-attr]


def test_a_payload_stays_out_of_the_log() -> None:
    """What does not fit is told by its place and kind, never by its content."""
    app = App()

    async def play(client: Client, data: Card) -> None: ...

    app.rpc(play)
    hook = app.find("rpc", "play")
    assert hook is not None
    with pytest.raises(Refused) as caught:
        hook.payload(b'{"suit": "my secret \' password"}')
    assert "secret" not in caught.value.why
    assert "$.suit" in caught.value.why


# --- answers ----------------------------------------------------------------------
@pytest.mark.parametrize("code", [0, 99, 113, 399, 2000, 3000])
def test_a_refusal_has_a_code_of_its_own(code: int) -> None:
    """Codes that are neither the application's (400 to 1999) nor in the protocol's table cannot be made."""
    with pytest.raises(ValueError, match=f"from 400 to 1999, got {code}"):
        Refuse(code, "no")


def test_refusals_say_what_they_mean() -> None:
    """The application's codes need a message; the protocol's have one, and know whether trying again helps."""
    with pytest.raises(ValueError, match="expected a message with the refusal 400"):
        Refuse(400)
    assert (Refuse().refusal.code, Refuse().refusal.message) == (103, "permission denied")
    assert Refuse(111).refusal.temporary
    assert Refuse(400, "wait", temporary=True).refusal.temporary


@pytest.mark.parametrize(
    ("code", "reason"), [(3000, "x"), (5000, "x"), (4000, ""), (4000, "é"), (4000, "1"), (4000, "x" * 124)]
)
def test_a_disconnect_is_one_that_sdks_understand(code: int, reason: str) -> None:
    """Codes outside 3001 to 4999 and reasons that SDKs misread cannot be made."""
    with pytest.raises(ValueError, match="expected a code from 3001 to 4999"):
        Disconnect(code, reason)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Welcome(user=1),  # type: ignore[arg-type]
        lambda: Welcome(channels="chat:a"),
        lambda: Welcome(channels=[1]),  # type: ignore[list-item]
        lambda: Change(tags={"a": 1}),  # type: ignore[dict-item]
    ],
)
def test_answers_are_checked_where_they_are_made(make: Callable[[], object]) -> None:
    """A wrong value raises in the hook's own line, so that the trace names it."""
    with pytest.raises(TypeError, match="expected"):
        make()


def test_what_json_cannot_hold_is_no_payload() -> None:
    """Foreign objects, endless and too deep structures never reach a wire; newlines do not survive."""
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    loop: list[Any] = []
    loop.append(loop)
    for value in (Opaque(), deep, loop, {1: Opaque()}):
        with pytest.raises(ValueError, match="expected a value that JSON can hold"):
            encoded(value)
    assert encoded(msgspec.Raw(b'{"a":\n1}')) == b'{"a":1}'
    assert encoded(msgspec.UNSET) is None
    assert encoded(None) == b"null"


# --- modules ----------------------------------------------------------------------
def _module(folder: Path, text: str, name: str = "bot_under_test.py") -> str:
    path = folder / name
    path.write_text(text)
    sys.modules.pop(path.stem, None)
    return str(path)


APP = "from server.app import App\n"


def test_a_module_with_one_app_is_enough(tmp_path: Path) -> None:
    """A file's sole App is found, whatever its name; one of several by ``:NAME``; a sibling module can be imported."""
    (tmp_path / "sibling_under_test.py").write_text("NAME = 'x'\n")
    one = _module(tmp_path, APP + "import sibling_under_test\nbot = App()\nagain = bot\n")
    assert isinstance(load(one), App)
    two = _module(tmp_path, APP + "a = App()\nb = App()\n")
    assert load(f"{two}:b") is sys.modules["bot_under_test"].b


def test_a_dotted_module_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's name is looked up from the folder in which the server is started."""
    (tmp_path / "package_under_test").mkdir()
    _module(tmp_path / "package_under_test", APP + "app = App()\n", "bot.py")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load("package_under_test.bot"), App)
    assert isinstance(load("package_under_test.bot:app"), App)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("x = 1\n", "", "bot_under_test.py: expected one App in it, or .*:NAME to choose, found none; write app"),
        (APP + "a = App()\nb = App()\n", "", "found a, b"),
        (APP + "a = App()\n", ":b", "bot_under_test.py: expected an App called 'b', got nothing"),
        (APP + "a = App()\nb = 1\n", ":b", "expected an App called 'b', got int"),
        ("x = 1\ny = = 2\n", "", r"bot_under_test.py:2: SyntaxError"),
        ("\n\nimport nowhere_at_all\n", "", r"bot_under_test.py:3: in <module>: ModuleNotFoundError: No module"),
        ("def f():\n    return 1 / 0\nf()\n", "", r"bot_under_test.py:2: in f: ZeroDivisionError"),
        ("raise SystemExit(3)\n", "", r"bot_under_test.py:1: in <module>: SystemExit"),
    ],
)
def test_a_faulty_module_is_told_by_file_and_line(tmp_path: Path, text: str, name: str, expected: str) -> None:
    """No App, two, another name, a module that does not import: the message names the file and the line."""
    with pytest.raises(AppError, match=expected):
        load(_module(tmp_path, text) + name)


def test_a_file_does_not_take_another_modules_name(tmp_path: Path) -> None:
    """An app in a file called json.py leaves Python's json alone."""
    import json

    assert isinstance(load(_module(tmp_path, APP + "app = App()\n", "app_json.py")), App)
    path = tmp_path / "json.py"
    path.write_text(APP + "app = App()\n")
    assert isinstance(load(str(path)), App)
    assert sys.modules["json"] is json


def test_missing_files_are_said() -> None:
    """A path or a module that is not there is told as it was given, and nothing of where we looked for it."""
    for place, why in (
        ("nowhere/bot.py", f"ImportError: there is no file {Path.cwd()}/nowhere/bot.py"),
        ("no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    ):
        with pytest.raises(AppError) as caught:
            load(place)
        assert str(caught.value) == f"--app {place} cannot be imported: {why}"


# --- changes ----------------------------------------------------------------------
def test_a_changed_file_is_noticed_once_it_is_there(tmp_path: Path) -> None:
    """A watched file that grows is named; one that vanishes for a moment is not; libraries are not watched."""
    file = tmp_path / "bot.py"
    file.write_text("a = 1\n")
    changes = Changes({str(file)})
    assert changes.look() is None
    file.unlink()
    assert changes.look() is None
    file.write_text("a = 1 + 1\n")
    assert changes.look() == str(file)
    assert not [path for path in changes.files() if "site-packages" in path]
    assert any(path.endswith("server/hooks.py") for path in changes.files())


def test_the_files_of_a_failed_import_are_known(tmp_path: Path) -> None:
    """What has to be mended is watched, though it is no module now: the faulty file and its importer."""
    (tmp_path / "broken_under_test.py").write_text("x = = 1\n")
    place = _module(tmp_path, "import broken_under_test\n")
    with pytest.raises(AppError) as caught:
        load(place)
    assert {place, str(tmp_path / "broken_under_test.py")} <= files_of(caught.value)


# --- documents ---------------------------------------------------------------------
def test_every_hook_is_documented() -> None:
    """docs/hooks.md has each hook with its parameters and what it may answer, and every method of the handles."""
    text = (ROOT / "docs" / "hooks.md").read_text()
    stated = {
        row[0].split("`")[1].removeprefix("@app."): (row[1].strip("`"), row[2].strip("`"))
        for row in rows(text[text.index("<!-- hooks -->") : text.index("<!-- /hooks -->")])
    }
    answers = {None: "", object: "any value"}
    assert stated == {
        name: (f"async ({', '.join(kind.parameters)})", answers.get(kind.answer, getattr(kind.answer, "__name__", "")))
        for name, kind in KINDS.items()
    }
    public = {name for handle in (Client, Server) for name in vars(handle) if not name.startswith("_")} - {"node"}
    assert {name for name in public if f"{name}(" not in text and f"{name}`" not in text} == set()


def test_examples_are_short_and_named() -> None:
    """Each example is under 100 lines, has a test, and stands in the README."""
    readme_ = (ROOT / "README.md").read_text()
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert len(examples) >= 4
    for example in examples:
        assert len(example.read_text().splitlines()) < 100
        assert f"`examples/{example.name}`" in readme_
        assert (ROOT / "tests" / "examples" / f"test_{example.name}").exists()
