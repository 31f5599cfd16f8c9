"""The files next to the package: version, requirements, citation, issue forms, CI."""

import configparser
import re

import pytest
import yaml
from helpers.paths import ROOT

import minikeras


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_citation_file_has_what_the_format_requires():
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    assert citation["version"] == minikeras.__version__


FORMS = sorted(
    set((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    - {ROOT / ".github/ISSUE_TEMPLATE/config.yml"}
)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_form_has_what_github_requires(path):
    form = read_yaml(path)
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) > 0
    for field in form["body"]:
        assert field["type"] in {"checkboxes", "dropdown", "input", "textarea"}
        assert field["attributes"]["label"]


def test_issue_forms_are_one_for_bugs_and_one_for_features():
    assert [path.name for path in FORMS] == ["bug.yml", "feature.yml"]
    assert isinstance(read_yaml(".github/ISSUE_TEMPLATE/config.yml")["blank_issues_enabled"], bool)


def test_version_is_that_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == minikeras.__version__


def test_requirements_of_the_core_are_five_packages():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = config["options"]["install_requires"].split()
    assert [re.split("[><=]", name)[0] for name in needed] == [
        "torch",
        "numpy",
        "pandas",
        "tqdm",
        "tabulate",
    ]


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    command = 'pip install -e ".[test]" && pytest -n 2 --dist loadfile'
    assert f"\n{command}\n" in readme
    assert f"readme_command='{command}'\n" in ci
