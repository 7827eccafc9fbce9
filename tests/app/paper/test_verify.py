"""Verification: what follows from the runs passes, and every change of a number, word, file or setting is named."""

from __future__ import annotations

import json
import shutil

import pytest

from depthscope.app.paper import export
from depthscope.app.paper.export import write_bundle
from depthscope.app.paper.replaced_folder import sha256
from depthscope.app.paper.verify import verify_bundle
from depthscope.app.readings.readings import read_paths, read_runs
from tests.app.dashboard.growing_run import add, begin
from tests.few_figures import draw_few


@pytest.fixture(scope="module")
def runs(make_run):
    # Analysed once: a verification is of the numbers, however they were read.
    return read_runs({"plain": make_run("residual", layers=2), "m": make_run("mhc", layers=2)})


@pytest.fixture(autouse=True, scope="module")
def _few_figures():
    with pytest.MonkeyPatch.context() as patch:
        draw_few(patch, composed=("gains",))
        yield


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    return write_bundle(runs, tmp_path_factory.mktemp("bundle") / "paper", formats=("pdf",))


@pytest.fixture
def bundle(written, tmp_path):
    return shutil.copytree(written, tmp_path / "paper")


def _change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _hide(bundle, name):
    """Write the hash of a changed file into the manifest, as somebody would who hides the change."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = sha256(bundle / name)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_a_bundle_follows_from_its_runs(bundle, runs):
    checked = verify_bundle(bundle, runs)
    assert checked.follows, checked.in_words()
    assert checked.in_words().endswith("everything follows")
    assert checked.as_dict()["follows"] is True


def test_the_order_in_which_runs_are_given_is_that_of_the_bundle(bundle, runs):
    checked = verify_bundle(bundle, list(reversed(runs)))
    assert checked.follows, checked.in_words()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_changed_number_is_named_with_what_follows(bundle, runs, hidden):
    csv = bundle / "tables" / "summary.csv"
    number = csv.read_text().splitlines()[1].split(",")[6]
    _change(csv, number, "99.5")
    if hidden:
        _hide(bundle, "tables/summary.csv")
    checked = verify_bundle(bundle, runs)
    assert not checked.follows
    assert "99.5 was written" in checked.changed["tables/summary.csv"]
    assert ("tables/summary.csv" in checked.edited) is not hidden


def test_rounding_of_another_machine_is_no_change(bundle, runs):
    csv = bundle / "data" / "gains_composite_forward.csv"
    number = next(
        cell
        for cell in csv.read_text().replace("\n", ",").split(",")
        if cell.startswith("1.0") and len(cell) > 12
    )
    _change(csv, number, repr(float(number) * (1 + 1e-13)))
    _hide(bundle, "data/gains_composite_forward.csv")
    checked = verify_bundle(bundle, runs)
    assert "data/gains_composite_forward.csv" not in checked.changed


def test_changed_words_figures_and_files_are_named(bundle, runs):
    _change(bundle / "methods.txt", "2 runs", "3 runs")
    (bundle / "figures" / "gains.pdf").write_bytes(b"%PDF another figure")
    (bundle / "tables.tex").unlink()
    checked = verify_bundle(bundle, runs)
    assert "'We measured 3 runs" in checked.changed["methods.txt"]
    assert "figures/gains.pdf" in checked.edited
    assert checked.missing == ("tables.tex",)
    words = checked.in_words()
    assert "figures/gains.pdf: edited" in words
    assert words.endswith("not everything follows")


def test_another_drawing_under_the_right_hash_is_named(bundle, runs, monkeypatch):
    monkeypatch.setattr(export, "source_commit", lambda: "a" * 40)
    _change(bundle / "manifest.json", '"commit": "', '"commit": "' + "a" * 40 + '", "was": "')
    (bundle / "figures" / "gains.pdf").write_bytes(b"%PDF another figure")
    _hide(bundle, "figures/gains.pdf")
    (bundle / "notes.txt").write_text("mine")
    checked = verify_bundle(bundle, runs)
    assert checked.changed == {"figures/gains.pdf": "has other bytes than the same versions draw"}
    assert checked.notes == ("not written by an export, and not compared: notes.txt",)


def test_other_runs_are_named(bundle, runs, make_run):
    other = read_runs({"m": make_run("mhc", layers=2, seed=5)})
    checked = verify_bundle(bundle, [runs[0], *other])
    assert checked.runs == {"m": "has other numbers than the run that the bundle was made of"}
    assert "data/gains_single_forward.csv" in checked.changed
    assert checked.changed["figures/gains.pdf"] == "its numbers are others"
    assert verify_bundle(bundle, runs[:1]).runs["m"].endswith("was not given")


def test_only_what_the_bundle_names_is_read(bundle, runs, make_run, tmp_path):
    further = read_runs({"another": make_run("hc", layers=2)})
    checked = verify_bundle(bundle, [*further, *runs])
    assert checked.follows, checked.in_words()
    assert "given, and not of this bundle: another" in checked.notes
    with pytest.raises(ValueError, match="none of them was given; got another"):
        verify_bundle(bundle, further)
    elsewhere = tmp_path / "elsewhere.csv"
    (bundle / "tables" / "summary.csv").rename(elsewhere)
    (bundle / "tables" / "summary.csv").symlink_to(elsewhere)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["../elsewhere.csv"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    checked = verify_bundle(bundle, runs)
    assert checked.missing == ("tables/summary.csv",)
    assert checked.new == ("../elsewhere.csv",)
    assert not checked.edited


def test_a_changed_caption_in_the_manifest_is_named(bundle, runs):
    _change(bundle / "manifest.json", "Largest signed row sum", "Smallest signed row sum")
    checked = verify_bundle(bundle, runs)
    assert "figures/gains" in checked.facts
    assert not checked.follows


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"venue": "icml"', '"venue": "nature"'),
        ('"scope": "sequence"', '"scope": "nothing"'),
        ('"formats": [', '"formats": ["exe", '),
        ('"selection": {', '"selection": {"x": 1, '),
        ('"by": ""', '"by": "colour"'),
        ('"software": {', '"software": ["x"], "was": {'),
    ],
)
def test_settings_that_cannot_be_repeated_are_refused(bundle, runs, old, new):
    _change(bundle / "manifest.json", old, new)
    with pytest.raises(ValueError, match=r"cannot be repeated|no attribute 'colour'"):
        verify_bundle(bundle, runs)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path, runs):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="did not write"):
        verify_bundle(tmp_path, runs)


def test_what_lies_beside_the_runs_changes_nothing(make_run, tmp_path):
    """An unrelated file in their folder recoloured the runs, and 72 of 184 files did not follow any more."""
    from depthscope.diagnostics import save_run

    paths = [tmp_path / "mhc.zarr.zip", tmp_path / "zz.zarr.zip"]
    save_run(make_run("mhc", layers=2), paths[0])
    save_run(make_run("residual", layers=2), paths[1])
    bundle = write_bundle(read_paths([*map(str, paths)])[0], tmp_path / "paper", formats=("pdf",))
    save_run(make_run("hc", layers=2), tmp_path / "a.zarr.zip")
    checked = verify_bundle(bundle, read_paths([*map(str, paths)])[0])
    assert checked.follows, checked.in_words()
    assert not checked.redrawn


def test_a_live_store_follows_whenever_it_is_looked_at(make_run, tmp_path):
    store = begin(tmp_path / "live", make_run("residual", layers=2))
    add(store, 0, 3)
    store.finish()
    path = write_bundle(read_paths([str(store.path)])[0], tmp_path / "paper", formats=("pdf",))
    checked = verify_bundle(path, read_paths([str(store.path)])[0])  # its age is another one by now
    assert checked.follows, checked.in_words()
