"""The written pages: links that lead somewhere, a page of the interface that is the code's, and
examples that a cluster would take."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import gentron_fast
from gentron_fast.generate import parse_arguments

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_interface_page_is_the_codes():
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs/api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert api.PAGE.read_text() == api.page(), "docs/api.md is stale: make api"


def test_what_the_package_names_is_on_the_interface_page():
    page = (ROOT / "docs/api.md").read_text()
    for name in gentron_fast.__all__:
        assert f"`{name}`" in page, name


def test_the_readme_invites():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_version_is_the_changelogs_newest():
    newest = re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert gentron_fast.__version__ == newest
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert "version" in project["project"]["dynamic"]
    assert attribute == "gentron_fast.__version__"


def test_the_slurm_example_is_a_shell_script_that_numbers_its_tasks():
    path = ROOT / "docs/slurm.sh"
    subprocess.run(["bash", "-n", path], check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", path.read_text(), re.M))
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) > 1
    assert options["gpus-per-task"] == "1"
    wrong = subprocess.run(["bash", path, "train"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    # What it would start, under a srun that numbers one task of sixteen.
    run = """srun() { shift 2; echo "$@"; }; . "$0" "$@" """
    line = [run, path, "generate", "--prompts", "a file.txt"]
    environment = {"SLURM_CPUS_PER_TASK": "8", "GENTRON_PYTHON": "python"}
    started = subprocess.run(["bash", "-c", *line], env=environment, capture_output=True, text=True)
    assert started.stdout == "python -m gentron_fast.generate --prompts a file.txt\n"


def test_the_kubernetes_example_gives_each_pod_its_rank():
    (job,) = yaml.safe_load_all((ROOT / "docs/kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    variables = {entry["name"]: entry for entry in container["env"]}
    assert variables["WORLD_SIZE"]["value"] == str(spec["completions"])
    path = variables["RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {v["name"] for v in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    module, *arguments = container["args"]
    assert container["command"] == ["python", "-m"] and module == "gentron_fast.generate"
    args = parse_arguments(arguments)
    assert str(args.prompts).startswith("/prompts/") and args.out.startswith("/data/")
