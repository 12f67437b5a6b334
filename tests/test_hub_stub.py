import json

import pytest


pytestmark = pytest.mark.hub


def test_files_come_back_and_listings_agree(hub, tmp_path):
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    contents = {"one.txt": b"1", "a/two.txt": b"2" * 70000, "a/b/three.bin": bytes(range(256)), "empty.txt": b""}
    for path, data in contents.items():
        (source / path).write_bytes(data)
    printed = hub.run(
        f"""
import json, pathlib
from huggingface_hub import HfApi, snapshot_download, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
api = HfApi()
api.create_repo("tester/thing")
api.create_repo("tester/thing", exist_ok=True)
first = api.upload_folder(repo_id="tester/thing", folder_path={str(source)!r})
api.delete_file("one.txt", "tester/thing")
folder = pathlib.Path(snapshot_download("tester/thing", revision=first.oid))
failures = []
for function, arguments in [
    (hf_hub_download, ("tester/thing", "nothing.txt")),
    (api.model_info, ("tester/nothing",)),
    (snapshot_download, ("tester/thing",)),
]:
    try:
        function(*arguments, revision="0" * 40) if function is snapshot_download else function(*arguments)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        failures.append(type(error).__name__)
print(json.dumps([
    {{str(path.relative_to(folder)): len(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}},
    api.list_repo_files("tester/thing"),
    [entry.path for entry in api.list_repo_tree("tester/thing")],
    [entry.path for entry in api.list_repo_tree("tester/thing", recursive=True)],
    failures,
]))
"""
    )
    sizes, files, top, everything, failures = json.loads(printed.splitlines()[-1])
    assert sizes == {path: len(data) for path, data in contents.items()}
    assert sorted(files) == ["a/b/three.bin", "a/two.txt", "empty.txt"]
    assert sorted(top) == ["a", "empty.txt"]
    assert sorted(everything) == ["a", "a/b", "a/b/three.bin", "a/two.txt", "empty.txt"]
    assert failures == ["RemoteEntryNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"]
    stored = hub.files("tester/thing")
    assert all(stored[path] == contents[path] for path in stored)


def test_a_client_without_hf_vq(hub):
    code = "try:\n    import hf_vq\nexcept ModuleNotFoundError:\n    print('absent')\nelse:\n    print('present')"
    assert hub.run(code) == "present\n"
    assert hub.run(code, installed=False) == "absent\n"


def test_a_failing_client_fails_the_test(hub):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        hub.run("1 / 0")
