"""Receptors, ligands and libraries, good and bad."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDepictor

from cohobate.core.errors import InputError
from cohobate.docking.data import ComplexData, Lists, Split
from cohobate.docking.data.molecules import Problems, largest_fragment, read, reference, rows
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
    (tmp_path / "MESSY.SMI").write_bytes(b"\xef\xbb\xbf" + MESSY.encode())
    assert names(tmp_path / "MESSY.SMI")[0] == found
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


def damaged(content: bytes) -> bytes:
    """Compressed, with wrong bytes inside."""
    whole = bytearray(gzip.compress(content, mtime=0))
    whole[12:16] = b"\xff" * 4
    return bytes(whole)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("library.xyz", b"", "a library is"),
        ("library.csv", b"a,b\n1,2\n", "no column smiles"),
        ("library.smi.gz", b"not gzip", "library.smi.gz: "),
        ("library.parquet", b"no", "library.parquet: "),
        ("library.smi.gz", damaged(b"CCO\n" * 999), r"library\.smi\.gz: .*(decompress|CRC)"),
        ("library.smi.gz", damaged(b"CCO\n" * 999)[:30], r"library\.smi\.gz: "),
        ("library.sdf.gz", damaged(b"CCO\n" * 999), r"library\.sdf\.gz: .*(decompress|CRC)"),
        ("library.csv", b"smiles\n" + b"C" * 150_000, r"library\.csv: field larger"),
        ("library.csv", "smiles,id\nC,\xe9\n".encode("latin-1"), r"library\.csv: 'utf-8' codec"),
    ],
)
@pytest.mark.parametrize("reader", [read, rows])
def test_what_is_no_library_is_one_line(tmp_path, reader, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(reader(tmp_path / name, Problems()))


def test_a_truncated_file_of_poses_is_one_line(tmp_path):
    content = (embedded_folder() / "CDK2.poses.sdf.gz").read_bytes()
    (tmp_path / "CDK2.poses.sdf.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"CDK2\.poses\.sdf\.gz: Compressed file ended before"):
        load(tmp_path, Problems())


def test_a_csv_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfsmiles,id\nCCO,a\n")
    assert [row[:2] for row in rows(tmp_path / "a.csv", Problems())] == [("CCO", "a")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.txt", b"", "a receptor is"),
        ("r.pdb", b"HEADER\n", "no amino acid"),
        ("r.cif", b"no cif", "r.cif: "),
        ("r.pdb.gz", b"not gzip", "r.pdb.gz: "),
        ("r.pdb.gz", damaged(b"ATOM\n" * 999), r"r\.pdb\.gz: .*(decompress|CRC)"),
        ("r.pdb", b"\xe9\xff", r"r\.pdb: 'utf-8' codec"),
    ],
)
def test_what_is_no_receptor_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
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


@pytest.mark.parametrize("size", [(0, 20, 20), (20, -1, 20), (20, 20, float("nan")), (20, 20)])
def test_a_box_without_volume_is_one_line(receptor, size):
    with pytest.raises(InputError, match="r: a box has a centre of three numbers and a size of"):
        find_pocket(receptor, box=((0, 0, 0), size), source="r")
    with pytest.raises(InputError, match="is the box in its frame"):
        find_pocket(receptor, box=((9e3, 0, 0), (1, 1, 1)))
    with pytest.raises(InputError, match="a box has a centre"):
        Box((0, 0, 0), size)


def test_a_drawing_is_no_reference_ligand(receptor, tmp_path):
    with pytest.raises(InputError, match="reference ligand has no 3-D coordinates"):
        find_pocket(receptor, ligand=np.eye(5, 3) * [1.0, 1.0, 0.0])
    drawn = Chem.MolFromSmiles("CCO")
    rdDepictor.Compute2DCoords(drawn)
    (tmp_path / "drawn.sdf").write_text(Chem.SDWriter.GetText(drawn))
    with pytest.raises(InputError, match=r"drawn\.sdf: .* has no 3-D coordinates"):
        reference(tmp_path / "drawn.sdf")


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
    [
        ("center_x = 1\n", "no number for"),
        ("", "no number for"),
        ("".join(f"center_{a} = 1\nsize_{a} = 0\n" for a in "xyz"), r"box\.txt: a box has"),
    ],
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


def pdbbind(root: Path, table: str = "", count: int = 12) -> Path:
    """Complexes of one target in a folder each, made from the embedded poses."""
    records = list(read(embedded_folder() / "CDK2.poses.sdf.gz", Problems()))[:count]
    pocket = gzip.decompress((embedded_folder() / "CDK2.pocket.pdb.gz").read_bytes())
    for number, record in enumerate(records):
        folder = root / f"c{number}"
        folder.mkdir(parents=True)
        (folder / f"c{number}_protein.pdb").write_bytes(pocket)
        text = Chem.SDWriter.GetText(record.molecule)
        (folder / f"c{number}_ligand.sdf").write_text(text)
    if table:
        (root / "affinities.csv").write_text(table)
    return root


def test_a_pdbbind_style_folder(tmp_path):
    pdbbind(tmp_path, "\ufeffid,pK,error\nc0,6.5,0.3\nc1,,\n", 3)
    (tmp_path / "c2" / "c2_ligand.sdf").unlink()
    problems = Problems()
    found = load(tmp_path, problems)
    assert [(c.target, c.label, c.weight) for c in found[:1]] == [("c0", 6.5, 0.3)]
    assert np.isnan(found[1].label)
    assert found[1].weight == 1.0
    assert float(found[0].features()["sigma"]) == pytest.approx(0.3)
    assert problems.lines() == ["c2_protein.pdb: folder: no c2_ligand.sdf or .mol2"]
    (chain,) = found[0].pocket.chains
    source = embedded_folder() / "CDK2.pocket.pdb.gz"
    assert len(chain.sequence) == len(read_receptor(source)[0][0])


def test_a_drawn_ligand_is_listed_and_not_taken_for_a_pose(tmp_path):
    pdbbind(tmp_path, count=2)
    drawn = Chem.MolFromSmiles("CCOc1ccccc1")
    rdDepictor.Compute2DCoords(drawn)
    (tmp_path / "c0" / "c0_ligand.sdf").write_text(Chem.SDWriter.GetText(drawn))
    problems = Problems()
    assert [c.name for c in load(tmp_path, problems)] == ["c1"]
    assert "no 3-D coordinates" in problems.lines()[0]


TWELVE = [f"c{i},{5 + 0.2 * i}" for i in range(12)]


@pytest.mark.parametrize(
    ("table", "groups"),
    [
        ("id,pK\n" + "\n".join(TWELVE), 1),
        ("id,pK,target\n" + "\n".join(f"{r},{'ab'[i % 2]}" for i, r in enumerate(TWELVE)), 2),
    ],
)
def test_lists_of_a_pdbbind_style_folder(tmp_path, table, groups):
    lists = Lists(least=2)
    data = ComplexData(pdbbind(tmp_path, table), batches="lists", lists=lists, max_residues=4)
    data.setup()
    drawn = [batch["group"].unique().tolist() for batch in data.train_dataloader()]
    assert len(data.train_dataloader().dataset) == groups
    assert all(drawn)
    assert {g for one in drawn for g in one} == set(range(groups))
    if groups == 1:  # every protein stays one of its own for the split
        parts = Split(by="protein").apply(data.data.complexes)
        assert min(map(len, parts.values())) >= 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "no training complex has a label"),
        ("id,pK\n" + "\n".join(f"c{i},nan" for i in range(12)), "no training complex has a label"),
        ("id,pK\n" + "\n".join(TWELVE), "no target has 10 labelled molecules to train on"),
        ("id,kd\nc0,6\n", r"affinities\.csv: no column pK"),
        ("id,pK\nc0,six\n", r"affinities\.csv: line 2: pK six is no number"),
        ("id,pK,error\nc0,6,0\n", r"affinities\.csv: line 2: error 0 is not above 0"),
    ],
)
def test_bad_labels_are_one_line(tmp_path, table, message):
    with pytest.raises(InputError, match=message):
        ComplexData(pdbbind(tmp_path, table), batches="lists").setup()


def test_a_table_in_latin_1_is_one_line(tmp_path):
    (pdbbind(tmp_path, count=1) / "affinities.csv").write_bytes(b"id,pK,note\nc0,6,\xe9\n")
    with pytest.raises(InputError, match=r"affinities\.csv: 'utf-8' codec"):
        load(tmp_path, Problems())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", r"index\.csv\.gz: Not a gzipped file"),
        (gzip.compress(b"system,index,protein\na,1,P\n"), "no column pK"),
        (gzip.compress(b"system,index,protein,pK\na,1,P,six\n"), "line 2: pK six is no number"),
    ],
)
def test_a_bad_index_of_the_benchmark_is_one_line(tmp_path, content, message):
    (tmp_path / "index.csv.gz").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path, Problems())


def test_poses_without_a_score_are_one_line(tmp_path):
    for path in embedded_folder().glob("CDK2.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    poses = tmp_path / "CDK2.poses.sdf.gz"
    text = gzip.decompress(poses.read_bytes()).replace(b"vina_kcal_mol", b"other")
    poses.write_bytes(gzip.compress(text))
    with pytest.raises(InputError, match=r"CDK2\.poses\.sdf\.gz: record 1: no number in vina"):
        load(tmp_path, Problems())


def test_embedded_complexes_have_their_chains():
    found = {c.target: c.pocket.chains for c in load(None, Problems())}
    assert len(found) == 6
    assert all(len(chains) == 1 and len(chains[0].sequence) > 200 for chains in found.values())
    assert found["CDK2"][0].sequence.startswith("MENFQKVEKIGE")


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
    for name, models in (("1iep_ligand.pdbqt", 1), ("1iep_ligand_vina_out.pdbqt", 4)):
        every = list(read(real / "formats" / name, Problems()))
        assert [r.molecule.GetNumHeavyAtoms() for r in every] == [37] * models
        places = [r.molecule.GetConformer().GetPositions() for r in every]
        assert len({p.tobytes() for p in places}) == models


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
