"""Receptors, ligands and libraries, good and bad."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem

from cohobate.core.errors import InputError
from cohobate.docking.data.molecules import Problems, largest_fragment, read, rows
from cohobate.docking.data.receptors import (
    Chain,
    crop,
    find_pocket,
    read_receptor,
    with_chains,
)
from cohobate.docking.data.sources import embedded_folder, load
from cohobate.docking.vina import Box

MESSY = """\
CC(=O)Oc1ccccc1C(=O)O aspirin
C1CC1( unclosed

C(C)(C)(C)(C)C five
[Na+].CC(=O)[O-] salt
C[C@H](N)C(=O)O l-ala
"""


def names(path: Path) -> tuple[list[str], list[str]]:
    problems = Problems()
    return [r.name for r in read(path, problems)], problems.lines()


def test_a_messy_list_is_read_and_what_is_bad_is_listed(tmp_path):
    path = tmp_path / "messy.smi"
    path.write_text(MESSY)
    found, bad = names(path)
    assert found == ["aspirin", "salt", "l-ala"]
    assert bad[0].startswith("messy.smi: line 2: not SMILES")
    assert bad[1].startswith("messy.smi: line 4: Explicit valence")
    assert len(bad) == 2
    salt = next(r for r in read(path, Problems()) if r.name == "salt").molecule
    assert Chem.MolToSmiles(largest_fragment(salt)) == "CC(=O)[O-]"


@pytest.mark.parametrize("kind", ["smi.gz", "csv", "csv.gz", "parquet", "sdf", "sdf.gz"])
def test_every_kind_of_library(tmp_path, kind):
    path, wanted = tmp_path / f"library.{kind}", ["CCO", "c1ccccc1"]
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"id": ["a", "b"], "SMILES": wanted}), path)
    else:
        if kind.startswith("csv"):
            text = "id,SMILES\n" + "".join(f"{i},{s}\n" for i, s in zip("ab", wanted, strict=True))
        elif kind.startswith("smi"):
            text = "".join(f"{s} {i}\n" for i, s in zip("ab", wanted, strict=True))
        else:
            blocks = []
            for i, s in zip("ab", wanted, strict=True):
                molecule = Chem.MolFromSmiles(s)
                molecule.SetProp("_Name", i)
                blocks.append(Chem.SDWriter.GetText(molecule))
            text = "".join(blocks)
        if kind.endswith("gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
    found = [(Chem.MolToSmiles(r.molecule), r.name) for r in read(path, Problems())]
    assert found == list(zip(wanted, "ab", strict=True))
    assert [row[:2] for row in rows(path, Problems())] == found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("library.xyz", b"", "a library is"),
        ("library.csv", b"a,b\n1,2\n", "no column smiles"),
        ("library.smi.gz", b"not gzip", "library.smi.gz: "),
        ("library.parquet", b"no", "library.parquet: "),
    ],
)
def test_what_is_no_library_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read(tmp_path / name, Problems()))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.txt", "", "a receptor is"),
        ("r.pdb", "HEADER\n", "no amino acid"),
        ("r.cif", "no cif", "r.cif: "),
        ("r.pdb.gz", "not gzip", "r.pdb.gz: "),
    ],
)
def test_what_is_no_receptor_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_receptor(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.pdb: No such file"):
        read_receptor(tmp_path / "nothing.pdb")
    with pytest.raises(InputError, match=r"nothing\.smi: No such file"):
        list(read(tmp_path / "nothing.smi", Problems()))


@pytest.fixture
def receptor():
    return read_receptor(embedded_folder() / "CDK2.pocket.pdb.gz")


def test_a_pocket_by_ligand_box_and_residues(receptor):
    whole = find_pocket(receptor, box=((0, 0, 0), (1e4, 1e4, 1e4)))
    point = whole.ca[:1] + 2.0
    near = find_pocket(receptor, ligand=point, cutoff=5.0)
    assert 0 < len(near.types) < len(whole.types)
    again = find_pocket(receptor, residues=near.names)
    assert again.names == near.names
    np.testing.assert_array_equal(again.side, near.side)
    assert len(whole.nearest(whole.centre, 7).types) == 7
    assert crop(receptor, near).count(" CA ") == len(near.types)


def test_bad_pockets(receptor):
    with pytest.raises(InputError, match="no residue; is the ligand in its frame"):
        find_pocket(receptor, ligand=np.full((1, 3), 9e3))
    with pytest.raises(InputError, match="no residue A:9999"):
        find_pocket(receptor, residues=["A:9999"])
    with pytest.raises(InputError, match="by a ligand, a box, or residues"):
        find_pocket(receptor)


def test_a_glycine_has_its_side_chain_at_its_alpha_carbon(receptor):
    whole = find_pocket(receptor, box=((0, 0, 0), (1e4, 1e4, 1e4)))
    glycine = whole.types == 7
    assert glycine.any()
    np.testing.assert_array_equal(whole.side[glycine], whole.ca[glycine])
    assert (np.linalg.norm(whole.side[~glycine] - whole.ca[~glycine], axis=1) > 0.5).all()


def protein(chains: dict[str, list[str]], free: str = "") -> str:
    """A mmCIF whose chains lie 100 Å apart; ``free`` is an amino acid beside the first."""
    columns = "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id "
    columns += "label_entity_id label_seq_id Cartn_x Cartn_y Cartn_z auth_seq_id auth_asym_id"
    lines = ["data_x", "loop_", *(f"_atom_site.{c}" for c in columns.split())]
    rows = [
        ("ATOM", residue, name, str(place + 1), str(number), 4.0 * number, 100.0 * place)
        for place, (name, residues) in enumerate(chains.items())
        for number, residue in enumerate(residues, 1)
    ]
    if free:
        rows.append(("HETATM", free, next(iter(chains)), "9", ".", 8.0, 3.0))
    for group, residue, chain, entity, number, x, y in rows:
        own = f"{number if number != '.' else 901} {chain}"
        label = chain if number != "." else "Z9"
        lines += [
            f"{group} 1 {atom[0]} {atom} . {residue} {label} {entity} {number} {x + dx} {y} 0 {own}"
            for dx, atom in enumerate(("N", "CA", "C"))
        ]
    return "\n".join(lines) + "\n"


def test_the_whole_chains_that_line_a_pocket(tmp_path):
    chains = {"AA": ["MET", "MSE", "HIE"], "AB": ["GLY", "UNK"], "B": ["TRP"]}
    (tmp_path / "r.cif").write_text(protein(chains, free="GLU"))
    structure = read_receptor(tmp_path / "r.cif")
    near_two = np.array([[8.0, 1.0, 0.0], [4.0, 101.0, 0.0]])
    pocket = find_pocket(structure, ligand=near_two, cutoff=4.5)
    assert {n.split(":")[0] for n in pocket.names} == {"AA", "AB"}
    assert pocket.chains == ()
    whole = with_chains(structure, pocket)
    assert whole.chains == (Chain("MMH"), Chain("GX"))
    assert whole.nearest(whole.centre, 1).chains == whole.chains


def test_a_sequence_has_what_was_not_resolved_where_the_file_knows_it(tmp_path):
    atoms = "".join(
        f"ATOM  {serial:5d} {name:^4} {residue} A{number:4d}    "
        f"{4.0 * number + serial % 3:8.3f}   0.000   0.000  1.00  0.00           {name[0]}\n"
        for number, residue in ((2, "CYX"), (4, "LYS"))
        for serial, name in enumerate(("N", "CA", "C"), 3 * number)
    )
    pockets = []
    for head in ("", "SEQRES   1 A    5  ALA CYS GLY LYS TYR\n"):
        (tmp_path / "r.pdb").write_text(head + atoms + "TER\nEND\n")
        structure = read_receptor(tmp_path / "r.pdb")
        pocket = find_pocket(structure, residues=["A:2"])
        pockets.append(with_chains(structure, pocket).chains)
    assert pockets == [(Chain("CK"),), (Chain("ACGKY"),)]


@pytest.mark.parametrize(
    ("text", "message"),
    [("center_x = 1\n", "no number for"), ("", "no number for")],
)
def test_bad_boxes(tmp_path, text, message):
    (tmp_path / "box.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        Box.read(tmp_path / "box.txt")


def test_a_folder_without_complexes_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no complexes"):
        load(tmp_path, Problems())
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "x", Problems())


def test_a_pdbbind_style_folder(tmp_path):
    source = embedded_folder()
    target = next(source.glob("*.poses.sdf.gz")).name.split(".")[0]
    record = next(iter(read(source / f"{target}.poses.sdf.gz", Problems())))
    for name in ("1abc", "2abc"):
        folder = tmp_path / name
        folder.mkdir()
        pocket = gzip.decompress((source / f"{target}.pocket.pdb.gz").read_bytes())
        (folder / f"{name}_protein.pdb").write_bytes(pocket)
    (tmp_path / "1abc" / "1abc_ligand.sdf").write_text(Chem.SDWriter.GetText(record.molecule))
    (tmp_path / "affinities.csv").write_text("id,pK\n1abc,6.5\n")
    problems = Problems()
    (found,) = load(tmp_path, problems)
    assert (found.target, found.label) == ("1abc", 6.5)
    assert problems.lines() == ["2abc_protein.pdb: folder: no 2abc_ligand.sdf or .mol2"]
    (chain,) = found.pocket.chains
    assert len(chain.sequence) == len(read_receptor(source / f"{target}.pocket.pdb.gz")[0][0])


def test_a_table_names_the_chains_of_targets(tmp_path):
    for path in embedded_folder().glob("CDK2.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert load(tmp_path, Problems())[0].pocket.chains == ()
    (tmp_path / "a.a3m").write_text(">a\nMENF\n")
    table = tmp_path / "sequences.csv"
    table.write_text("target,sequence,msa\nCDK2,menf,a.a3m\nOther,M,\nCDK2,SKKN,\n")
    found = load(tmp_path, Problems())
    assert found[0].pocket.chains == (Chain("MENF", tmp_path / "a.a3m"), Chain("SKKN"))
    assert len({id(c.pocket) for c in found}) == 1
    for text, message in (
        ("target,sequence\nCDK2,ME NF\n", "line 2: needs target and sequence, letters alone"),
        ("target,chain\nCDK2,MENF\n", "line 2: needs target and sequence"),
        ("target,sequence,msa\nCDK2,MENF,b.a3m\n", r"line 2: no alignment .*b\.a3m"),
    ):
        table.write_text(text)
        with pytest.raises(InputError, match=message):
            load(tmp_path, Problems())


BINDINGDB = """\
BindingDB MonomerID\tLigand SMILES\tTarget Name\tKi (nM)\tIC50 (nM)\tKd (nM)
11\tCC(=O)Nc1ccccc1\tKinase\t 100 \t5\t
12\tCC(=O)Nc1ccccc1\tKinase\t1\t\t
13\tc1ccccc1O\tKinase\t\t>10000\t
14\tC1CC\tKinase\t\t10\t
15\tc1ccccc1N\tKinase\t\t\t
16\tCCO\tOther\t1\t\t
17\tCCN\tKinase\t\t1000\t10
"""


def test_a_bindingdb_table(tmp_path):
    source = embedded_folder()
    (tmp_path / "p.pdb.gz").write_bytes((source / "CDK2.pocket.pdb.gz").read_bytes())
    (tmp_path / "l.sdf.gz").write_bytes((source / "CDK2.poses.sdf.gz").read_bytes())
    (tmp_path / "b.tsv").write_text(BINDINGDB)
    sites = tmp_path / "receptors.csv"
    sites.write_text("target,receptor,ligand\nKinase,p.pdb.gz,l.sdf.gz\n")
    problems = Problems()
    found = load(tmp_path, problems)
    assert [(c.name, c.label) for c in found] == [("11", 8.0), ("17", 8.0)]
    assert not found[0].molecule.GetNumConformers()
    assert len(found[0].pocket.chains) == 1
    assert [line.split(": ", 2)[1] for line in problems.lines()] == ["line 4", "line 5", "line 6"]
    assert "IC50 (nM) >10000: not a value" in problems.lines()[0]
    assert found[0].features()["pose"].isnan().all()
    sites.write_text("target,receptor,ligand\nKinase,p.pdb.gz,\n")
    with pytest.raises(InputError, match="line 2: needs target, receptor and ligand"):
        load(tmp_path, Problems())
    (tmp_path / "b.tsv").write_text("Target Name\tx\n")
    sites.write_text("target,receptor,ligand\nKinase,p.pdb.gz,l.sdf.gz\n")
    with pytest.raises(InputError, match="no column Ligand SMILES"):
        load(tmp_path, Problems())


def test_the_formats_of_real_files(real):
    box = Box.read(real / "formats" / "1iep_receptor.box.txt")
    assert box.centre == (15.19, 53.903, 16.917)
    pockets = [
        find_pocket(read_receptor(real / "formats" / name), box=(box.centre, box.size))
        for name in ("1iep_receptor.pdbqt.gz", "1iep_receptor_noH.cif.gz")
    ]
    assert abs(len(pockets[0].types) - len(pockets[1].types)) <= 2
    chains = [
        with_chains(read_receptor(real / "formats" / name), pocket).chains
        for name, pocket in zip(
            ("1iep_receptor.pdbqt.gz", "1iep_receptor_noH.cif.gz"), pockets, strict=True
        )
    ]
    assert chains[0] == chains[1]
    assert [len(c.sequence) for c in chains[0]] == [274]
    assert "HRDLAARN" in chains[0][0].sequence
    found, bad = names(real / "formats" / "messy_library.smi")
    assert len(found) == 11
    assert len(bad) == 2
    for name in ("1iep_ligand.pdbqt", "1iep_ligand_vina_out.pdbqt"):
        (one,) = read(real / "formats" / name, Problems())
        assert one.molecule.GetNumHeavyAtoms() == 37


def test_every_redocking_complex_is_read_or_reported(real):
    folder, unread = real / "redock", []
    for path in sorted(folder.glob("*.ligand.sdf")):
        problems = Problems()
        structure = read_receptor(path.with_name(path.name.replace("ligand.sdf", "protein.pdb.gz")))
        for record in read(path, problems):
            atoms = record.molecule.GetConformer().GetPositions()
            pocket = find_pocket(structure, ligand=atoms, source=path.name)
            assert len(pocket.types) > 3, path.name
        unread += problems.lines()
    assert len(unread) == 1
    assert unread[0].startswith("1cbr.ligand.sdf: record 1: ")


def test_every_pose_file_is_read_or_reported(real):
    counted = {}
    for path in sorted((real / "pose_checks").iterdir()):
        if ".pdb" in path.name:
            read_receptor(path)
            continue
        found, bad = names(path)
        counted[path.name] = (len(found), len(bad))
        assert found or bad, path.name
    assert counted["mol_single_hydrogen.sdf"] == (0, 1)
    assert counted["1G9V_RQ3__1G9V_RQ3_gold_redock.sdf.gz"][0] > 10
