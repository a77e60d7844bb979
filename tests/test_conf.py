"""What the configuration finds out about where it is."""

import runpy
import shutil
import subprocess

import pytest
from conftest import ROOT

URL = "https://github.com/owner/name.git"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    shutil.copy2(ROOT / "conf.py", tmp_path)
    return tmp_path


def repository(folder):
    return runpy.run_path(str(folder / "conf.py"))["html_context"]["repository"]


def clone(folder):
    subprocess.run(["git", "init", "-q", folder], check=True)
    command = ["git", "-C", folder, "remote", "add", "origin", URL]
    subprocess.run(command, check=True)


def test_repository_is_the_clones_or_the_workflows(copy, monkeypatch):
    clone(copy)
    assert repository(copy) == "owner/name"
    monkeypatch.setenv("GITHUB_REPOSITORY", "another/fork")
    assert repository(copy) == "another/fork"


def test_copy_inside_another_repository_has_none(copy):
    clone(copy)
    inside = copy / "unpacked"
    inside.mkdir()
    shutil.copy2(copy / "conf.py", inside)
    assert repository(inside) == ""


def test_machine_without_git_has_none(copy, monkeypatch):
    clone(copy)
    monkeypatch.setenv("PATH", str(copy))
    assert repository(copy) == ""
