"""Stands in for Boltz, OpenFold3 and the released AuroBind: reads their inputs, writes their files.

Only the options and fields that their documentation has are taken. A protein's tokens are all 1, a
ligand's all 2. It stops after FAKE_STOP answers, and leaves out the complex FAKE_SKIP. Files of
torch are copied from FAKE_TORCH by numbers of residues and atoms: to import it takes too long.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import yaml
from rdkit import Chem

WIDTH = 3


def sizes(sequences, smiles):
    return sum(map(len, sequences)), Chem.MolFromSmiles(smiles).GetNumHeavyAtoms()


def copy(kind, residues, atoms, path):
    shutil.copy(Path(os.environ["FAKE_TORCH"]) / f"{kind}-{residues}-{atoms}.pt", path)


def read_yaml(path, *, server):
    document = yaml.safe_load(path.read_text())
    assert document.pop("version") == 1
    sequences, smiles = [], None
    for entry in document["sequences"]:
        ((kind, entity),) = entry.items()
        ids = entity["id"] if isinstance(entity["id"], list) else [entity["id"]]
        assert all(isinstance(i, str) for i in ids)
        if kind == "ligand":
            assert set(entity) == {"id", "smiles"}
            smiles = entity["smiles"]
        else:
            assert smiles is None, "the ligand is the last"
            assert set(entity) == {"id", "sequence"} | (set() if server else {"msa"})
            assert server or entity["msa"] == "empty" or Path(entity["msa"]).exists()
            sequences += [entity["sequence"]] * len(ids)
    return document, sequences, smiles


class Answered:
    """Counts and notes what was asked."""

    def __init__(self, out):
        self.out, self.count = Path(out), 0

    def wanted(self, name):
        if str(self.count) == os.environ.get("FAKE_STOP"):
            print(
                "Predicting: 10%\rPredicting: 20%\nRuntimeError: out of memory\n", file=sys.stderr
            )
            sys.exit(3)
        self.count += 1
        with (self.out / "asked.txt").open("a") as file:
            file.write(f"{name}\n")
        return name != os.environ.get("FAKE_SKIP")


def boltz(parser, words):
    parser.add_argument("command", choices=["predict"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out_dir", type=Path, default=Path())
    parser.add_argument("--write_embeddings", action="store_true")
    parser.add_argument("--use_msa_server", action="store_true")
    args = parser.parse_args(words)
    done = args.out_dir / f"boltz_results_{args.data.stem}" / "predictions"
    answered = Answered(args.out_dir)
    for path in sorted(args.data.glob("*")):
        assert path.suffix == ".yaml"
        name, folder = path.stem, done / path.stem
        if folder.exists() or not answered.wanted(name):
            continue
        document, sequences, smiles = read_yaml(path, server=args.use_msa_server)
        binder = document["properties"][0]["affinity"]["binder"]
        assert binder == document["sequences"][-1]["ligand"]["id"]
        residues, atoms = sizes(sequences, smiles)
        found = np.repeat(np.float32([[1] * WIDTH, [2] * WIDTH]), (residues, atoms), axis=0)
        folder.mkdir(parents=True)
        if args.write_embeddings:
            np.savez_compressed(folder / f"embeddings_{name}.npz", s=found[None], z=found[None])
        content = {"affinity_pred_value": -1 - atoms / 100, "affinity_probability_binary": 0.5}
        (folder / f"affinity_{name}.json").write_text(json.dumps(content))


def aurobind(parser, words):
    parser.add_argument("data", type=Path)
    parser.add_argument("--out_dir", type=Path, default=Path())
    parser.add_argument("--save_features", action="store_true")
    parser.add_argument("--num_diffusion_samples", type=int, default=5)
    parser.add_argument("--use_msa_server", action="store_true")
    args = parser.parse_args(words)
    out, answered = args.out_dir / args.data.stem, Answered(args.out_dir)
    for path in sorted(args.data.glob("*.yaml")):
        name = path.stem
        if not answered.wanted(name):
            continue
        document, sequences, smiles = read_yaml(path, server=args.use_msa_server)
        assert set(document) == {"sequences"}
        residues, atoms = sizes(sequences, smiles)
        features, folder = out / "features" / name, out / "predictions" / name
        for made in (features, folder):
            made.mkdir(parents=True, exist_ok=True)
        if args.save_features:
            copy("aurobind", residues, atoms, features / f"features_{name}.pt")
        text = json.dumps({"affinity": 7 + atoms / 100})
        (folder / f"{name}_seed-42_affinity.json").write_text(text)


def openfold3(parser, words):
    parser.add_argument("command", choices=["predict"])
    parser.add_argument("--query_json", type=Path, required=True)
    parser.add_argument("--runner_yaml", type=Path)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--use_msa_server", default="True")
    parser.add_argument("--use_templates", default="True")
    args = parser.parse_args(words)
    settings = yaml.safe_load(args.runner_yaml.read_text())["output_writer_settings"]
    answered = Answered(args.output_dir)
    for name, query in json.loads(args.query_json.read_text())["queries"].items():
        if not answered.wanted(name):
            continue
        *proteins, ligand = query["chains"]
        assert ligand["molecule_type"] == "ligand"
        sequences = [p["sequence"] for p in proteins for _ in p["chain_ids"]]
        residues, atoms = sizes(sequences, ligand["smiles"])
        folder = args.output_dir / name / "seed_42"
        folder.mkdir(parents=True)
        if settings["write_latent_outputs"]:
            copy("openfold3", residues, atoms, folder / f"{name}_seed_42_latent_output.pt")


if __name__ == "__main__":
    programs = {"boltz": boltz, "run_openfold": openfold3, "run_aurobind.py": aurobind}
    programs[Path(sys.argv[0]).name](argparse.ArgumentParser(allow_abbrev=False), sys.argv[1:])
