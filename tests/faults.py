# SPDX-License-Identifier: Apache-2.0
"""Plants one-line faults in the packages, one at a time, and names those that no quick test sees.

    python tests/faults.py map functions.json [TESTS ...]
    python tests/faults.py plant functions.json [--only WORD ...] [--results faults.json]

`map` runs the quick suite, or some of it, and notes which functions each test file runs; it needs
Python 3.12 or later, whose `sys.monitoring` makes that nearly free. `plant` plants each fault of
`tests/planted.py` in a copy of the tree and runs the test files that run its function, those of its
module's name first and then the quickest, until a test fails. All tests that failed must pass in a
copy without a fault. Prints a table; the exit status is 1 if more than MISSED_AT_MOST were missed.
With `--results` what was found is kept, and a later call goes on.
"""

import argparse
import ast
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from planted import FAULTS, Fault

ROOT = Path(__file__).parents[1]
PACKAGES = ("vivit_jax", "checkpoints_convert")
MISSED_AT_MOST = 2
MAPS = "FAULTS_MAPS"  # variable of the environment: a folder for what workers found
SECONDS = 1800  # that the tests of one fault may take


class Map:
    """A plugin of pytest that notes which functions each test file runs, and its seconds."""

    def __init__(self, path: Path):
        self.path, self.file = path, ""
        self.functions: dict[str, set[str]] = collections.defaultdict(set)
        self.seconds: dict[str, float] = collections.Counter()

    def pytest_sessionstart(self):
        events = sys.monitoring.events.PY_START
        sys.monitoring.use_tool_id(sys.monitoring.COVERAGE_ID, "functions of test files")
        sys.monitoring.register_callback(sys.monitoring.COVERAGE_ID, events, self.started)
        sys.monitoring.set_events(sys.monitoring.COVERAGE_ID, events)

    def started(self, code, _):
        path = code.co_filename
        if path.startswith(f"{ROOT}{os.sep}"):
            place = Path(path).relative_to(ROOT)
            if place.parts[0] in PACKAGES:
                self.functions[self.file].add(f"{place.as_posix()}:{code.co_qualname}")
        return sys.monitoring.DISABLE  # until the next file

    def pytest_runtest_logstart(self, location):
        if location[0] != self.file:
            self.file = location[0]
            sys.monitoring.restart_events()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.location[0]] += report.duration

    def pytest_sessionfinish(self):
        values = {
            file: {"seconds": seconds, "functions": sorted(self.functions[file])}
            for file, seconds in self.seconds.items()
        }
        self.path.write_text(json.dumps(values))


def pytest_configure(config):
    """As the plugin of a worker of pytest-xdist, which `write_map` starts."""
    if hasattr(config, "workerinput") and MAPS in os.environ:
        name = config.workerinput["workerid"]
        config.pluginmanager.register(Map(Path(os.environ[MAPS]) / f"{name}.json"))


def write_map(path: Path, tests: list[str]) -> int:
    """Add what test files run to a map."""
    import pytest

    whole = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        os.environ[MAPS] = directory
        args = ["-p", "faults", "-q", "--durations=100", "--rootdir", str(ROOT)]
        status = pytest.main([*args, *(tests or [str(ROOT / "tests")])])
        parts = [json.loads(part.read_text()) for part in Path(directory).glob("*.json")]
    for file in sorted({file for part in parts for file in part}):
        halves = [part[file] for part in parts if file in part]
        whole[file] = {
            "seconds": round(sum(half["seconds"] for half in halves), 1),
            "functions": sorted({name for half in halves for name in half["functions"]}),
        }
    path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    return int(status)


def function_at(text: str, line: int) -> str | None:
    """The qualified name of the innermost function of a file that holds a line."""

    def within(node: ast.AST, prefix: str) -> str | None:
        for child in ast.iter_child_nodes(node):
            if not getattr(child, "lineno", 0) <= line <= (getattr(child, "end_lineno", 0) or 0):
                continue
            if isinstance(child, ast.ClassDef):
                return within(child, f"{prefix}{child.name}.")
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name = prefix + child.name
                return within(child, f"{name}.<locals>.") or name
            return within(child, prefix)
        return None

    return within(ast.parse(text), "")


def planted(fault: Fault, root: Path) -> tuple[str, str]:
    """The text of a fault's file with it, and the function that it is in or the file."""
    text = (root / fault.path).read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(
            f"{fault.name!r}: {fault.path} holds {fault.old!r} {text.count(fault.old)} times, "
            "expected once; the code has moved: mend tests/planted.py"
        )
    function = function_at(text, text[: text.index(fault.old)].count("\n") + 1)
    return text.replace(fault.old, fault.new), f"{fault.path}:{function or ''}"


def files_for(place: str, whole: dict) -> list[str]:
    """The test files that run a function, or else anything of its file, the likeliest first."""
    path = place.partition(":")[0]
    for name in (place, f"{path}:"):
        found = [
            file
            for file, about in whole.items()
            if any(
                each == name or name.endswith(":") and each.startswith(name)
                for each in about["functions"]
            )
        ]
        if found:
            break
    module = Path(path).stem
    return sorted(found, key=lambda f: (module not in Path(f).stem, whole[f]["seconds"]))


def copied(directory: Path) -> Path:
    """A copy of the tracked files."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)
    return directory


def tested(root: Path, tests: list[str], *options: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    args = ["-n", "0", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *options, *tests]
    command = [sys.executable, "-P", "-m", "pytest", *args]
    return subprocess.run(
        command, cwd=root, env=env, capture_output=True, text=True, timeout=SECONDS
    )


def seen_by(fault: Fault, root: Path, whole: dict) -> dict:
    """The first test that fails with a fault, or None, among how many files, and the seconds."""
    text, place = planted(fault, root)
    kept, start = (root / fault.path).read_text(), time.monotonic()
    files = [file for file in files_for(place, whole) if (root / file).exists()]
    failed = None
    (root / fault.path).write_text(text)
    try:
        if files:
            done = tested(root, files, "-x")
            names = re.findall(
                r"^(?:FAILED|ERROR) (\S+::.+?|\S+\.py)(?: - .*)?$", done.stdout, re.M
            )
            if done.returncode not in (0, 1, 2) or (done.returncode and not names):
                raise SystemExit(f"{fault.name!r}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            failed = names[0] if names else None
    except subprocess.TimeoutExpired:
        failed = None
    finally:
        (root / fault.path).write_text(kept)
    seconds = round(time.monotonic() - start)
    return {"path": fault.path, "by": failed, "files": len(files), "seconds": seconds}


def plant(path: Path, words: list[str], results: Path | None) -> int:
    whole = json.loads(path.read_text())
    for fault in FAULTS:
        planted(fault, ROOT)
    found = json.loads(results.read_text()) if results and results.exists() else {}
    chosen = [f for f in FAULTS if not words or any(w in f"{f.name} {f.path}" for w in words)]
    with tempfile.TemporaryDirectory() as directory:
        root = copied(Path(directory))
        for fault in chosen:
            if fault.name not in found:
                found[fault.name] = seen_by(fault, root, whole)
                print(f"{found[fault.name]['by'] or 'MISSED'}  <-  {fault.name}", flush=True)
                if results:
                    results.write_text(json.dumps(found, indent=1) + "\n")
        failed = sorted({found[f.name]["by"] for f in chosen} - {None})
        done = tested(root, failed) if failed else None
        if done and done.returncode:
            raise SystemExit(f"these fail without a fault:\n{done.stdout[-4000:]}")
    missed = [fault for fault in chosen if not found[fault.name]["by"]]
    print("\n| fault | in | seen by |\n|---|---|---|")
    for fault in chosen:
        by = found[fault.name]["by"]
        print(f"| {fault.name} | {fault.path} | {by or '**missed**'} |")
    print(f"\n{len(chosen) - len(missed)} of {len(chosen)} faults are seen")
    return int(len(missed) > MISSED_AT_MOST)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    mapped = commands.add_parser("map")
    mapped.add_argument("file", type=Path)
    mapped.add_argument("tests", nargs="*")
    planting = commands.add_parser("plant")
    planting.add_argument("file", type=Path)
    planting.add_argument("--only", nargs="+", default=[])
    planting.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.command == "map":
        sys.exit(write_map(args.file.resolve(), args.tests))
    sys.exit(plant(args.file, args.only, args.results))
