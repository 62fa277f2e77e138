"""Where the public data sets' files lie, how they are read safely, and what is known of them: address, licence, checksum.

Files are looked for in the folder that ``MEDFED_DATA`` names, as ``medfed-simulate fetch`` lays them out.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medfed.errors import DataError
from medfed.seams import Files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LIMIT_BYTES = 1 << 28
_MOST_ARRAYS = 32


@dataclass(frozen=True, slots=True)
class Download:
    """One file at its official address. ``checksum``: ``sha256:`` or ``md5:`` and hexadecimal digits, None if none is known.

    ``unpack``: names of files inside a zip archive to lay out in place of the archive, each with its SHA-256.
    """

    url: str
    path: str
    checksum: str | None
    pinned_by: str
    limit_bytes: int
    unpack: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Dataset:
    """A public data set: its files, and what must be said when it is used. ``needs``: any one of these sets suffices."""

    name: str
    folder: str
    title: str
    licence: str
    citation: str
    page: str
    kind: Literal["table", "images", "series", "text", "molecules"]
    downloads: tuple[Download, ...]
    needs: tuple[tuple[str, ...], ...]

    @property
    def source(self) -> str:
        """One line for reports."""
        return f"{self.citation} {self.page}, {self.licence}"


_HEART_HASHES = (
    ("processed.cleveland.data", "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8"),
    ("processed.hungarian.data", "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796"),
    ("processed.switzerland.data", "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314"),
    ("processed.va.data", "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f"),
)
_ABSTRACTS = (
    "https://raw.githubusercontent.com/sebischair/Medical-Abstracts-TC-Corpus/70a2d9106c724729be8b3c4ddb00d1b14ec300c8"
)
_DISEASES = "https://raw.githubusercontent.com/spyysalo/ncbi-disease/5a266c6fc76fb2b5184cfa397ff0a5ecdb133aec/conll"
_DISEASE_HASHES = (
    ("train", "5f87b0de649eccff21e6d6e49e304aace808056ecae55225ea31602192517be9"),
    ("devel", "b4e1e7efcc2a35047bf2f3d281648357470e674f555d4a26a0049ac37d59cc61"),
    ("test", "8f088ce45dc4746592188f9e69de3d89d87f3bb8f0ed8c4a287d018123fa148d"),
)
_MOLECULES = "https://deepchemdata.s3-us-west-1.amazonaws.com/datasets"
_FLAMBY = "https://raw.githubusercontent.com/owkin/FLamby/0fc059bbb55dacaa1afa0bf8e053df1d33b8dd4a/flamby/datasets/fed_tcga_brca"
_CHALLENGE = "https://physionet.org/files/challenge-2012/1.0.0"

DATASETS: dict[str, Dataset] = {
    "heart-disease": Dataset(
        name="heart-disease",
        folder="heart_disease_uci",
        title="UCI Heart Disease, four hospitals, 920 patients",
        licence="CC BY 4.0",
        citation="Janosi (Budapest), Steinbrunn (Zurich), Pfisterer (Basel), Detrano (Long Beach and Cleveland) 1988,",
        page="UCI 10.24432/C52P4X",
        kind="table",
        downloads=(
            Download(
                "https://archive.ics.uci.edu/static/public/45/heart+disease.zip",
                "heart+disease.zip",
                "sha256:b17cd273da9ce1caa4710fce80227ea454d4dbf9fcbc8e6a9121672751563adc",
                "several independent records of this archive",
                1 << 21,
                _HEART_HASHES,
            ),
        ),
        needs=(tuple(name for name, _ in _HEART_HASHES),),
    ),
    "pneumonia": Dataset(
        name="pneumonia",
        folder="medmnist",
        title="PneumoniaMNIST 28x28, 5,856 chest films of children (Kermany et al. 2018)",
        licence="CC BY 4.0",
        citation="Yang et al., MedMNIST v2, Scientific Data 10:41 (2023),",
        page="Zenodo 10.5281/zenodo.10519652",
        kind="images",
        downloads=(
            Download(
                "https://zenodo.org/records/10519652/files/pneumoniamnist.npz?download=1",
                "pneumoniamnist.npz",
                "md5:28209eda62fecd6e6a2d98b1501bb15f",
                "the publisher's own list (medmnist/info.py)",
                1 << 24,
            ),
        ),
        needs=(("pneumoniamnist.npz",), ("pneumoniamnist_train_val.npz",)),
    ),
    "icu-mortality": Dataset(
        name="icu-mortality",
        folder="physionet2012",
        title="PhysioNet / CinC Challenge 2012, set A, 4,000 stays in intensive care",
        licence="ODC-By 1.0",
        citation="Silva et al., CinC 2012; Goldberger et al., Circulation 2000;",
        page="physionet.org/content/challenge-2012/1.0.0",
        kind="series",
        downloads=(
            Download(
                f"{_CHALLENGE}/set-a.tar.gz?download",
                "set-a.tar.gz",
                "sha256:8cb250f179cd0952b4b9ebcf8954b63d70383131670fac1cfee13deaa13ca920",
                "several independent records of this file",
                1 << 26,
            ),
            Download(
                f"{_CHALLENGE}/Outcomes-a.txt?download",
                "Outcomes-a.txt",
                "sha256:2613ea60ccda29f87571a7d6b09ad130858a8ccd66325bd073365925026883c2",
                "several independent records of this file",
                1 << 20,
            ),
        ),
        needs=(("set_a_hourly.npz",), ("set-a.tar.gz", "Outcomes-a.txt"), ("set-a.tar.xz", "Outcomes-a.txt")),
    ),
    "brca-survival": Dataset(
        name="brca-survival",
        folder="fed_tcga_brca",
        title="Fed-TCGA-BRCA, overall survival with breast cancer, 1,088 patients of six regions",
        licence="NCI GDC open-access clinical data (GDC data use policies); FLamby's preparation MIT",
        citation="du Terrail et al., FLamby, NeurIPS 2022; The Cancer Genome Atlas, Nature 490:61 (2012),",
        page="github.com/owkin/FLamby",
        kind="table",
        downloads=(
            Download(
                f"{_FLAMBY}/brca.csv",
                "brca.csv",
                "sha256:07cb53423f7d579d33cfdbf2cba57b2aee75318b85866c68ce39a75b1f1ba020",
                "a record of this file made elsewhere",
                1 << 22,
            ),
            Download(
                f"{_FLAMBY}/dataset_creation_scripts/train_test_split.csv",
                "train_test_split.csv",
                "sha256:5075d0e6f55daaab30dd86ef86b6ae04f08add8e3dc28f3404029d4edf3d4ab4",
                "a record of this file made elsewhere",
                1 << 20,
            ),
        ),
        needs=(("brca.csv", "train_test_split.csv"),),
    ),
    "medical-abstracts": Dataset(
        name="medical-abstracts",
        folder="text_medical_abstracts",
        title="Medical Abstracts, five classes of patients' conditions, the 2,888 of its test file",
        licence="CC BY-SA 3.0",
        citation="Schopf, Braun, Matthes, NLPIR 2022,",
        page="github.com/sebischair/Medical-Abstracts-TC-Corpus",
        kind="text",
        downloads=(
            Download(
                f"{_ABSTRACTS}/medical_tc_test.csv",
                "medical_tc_test.csv",
                "sha256:1eecea73c9ecad292c55e10403bd139fab9580545d6878482997c5564d51ac05",
                "several independent records of this file",
                1 << 24,
            ),
            Download(
                f"{_ABSTRACTS}/medical_tc_labels.csv",
                "medical_tc_labels.csv",
                "sha256:8a27ae03339c798103678efa8012f744a723ff71a80f2b2c1355ee249564adc5",
                "several independent records of this file",
                1 << 16,
            ),
        ),
        needs=(("medical_tc_test.csv",),),
    ),
    "ncbi-disease": Dataset(
        name="ncbi-disease",
        folder="ner_ncbi_disease",
        title="NCBI disease corpus, sentences of 793 abstracts with the names of diseases tagged",
        licence="public domain (US government work)",
        citation="Dogan, Leaman, Lu, J Biomed Inform 47 (2014), in the form of CoNLL by S. Pyysalo,",
        page="github.com/spyysalo/ncbi-disease",
        kind="text",
        downloads=tuple(
            Download(
                f"{_DISEASES}/{part}.tsv",
                f"{part}.tsv",
                f"sha256:{digest}",
                "the publisher's repository at this commit",
                1 << 22,
            )
            for part, digest in _DISEASE_HASHES
        ),
        needs=(tuple(f"{part}.tsv" for part, _ in _DISEASE_HASHES),),
    ),
    "bbbp": Dataset(
        name="bbbp",
        folder="moleculenet",
        title="BBBP, 2,050 molecules and whether they pass the blood-brain barrier",
        licence="no single licence: cite",
        citation="Martins et al., J Chem Inf Model 52 (2012), in MoleculeNet, Wu et al., Chem Sci 9 (2018),",
        page="moleculenet.org",
        kind="molecules",
        downloads=(
            Download(
                f"{_MOLECULES}/BBBP.csv",
                "BBBP.csv",
                "sha256:3c7436fad5044f5f5cde11798e02ec488761509939f66b247692f5a32a41d2f1",
                "the copy that medfed was tried with: its publisher names no checksum",
                1 << 22,
            ),
        ),
        needs=(("BBBP.csv",),),
    ),
    "clintox": Dataset(
        name="clintox",
        folder="moleculenet",
        title="ClinTox, 1,491 drugs: approved, failed for toxicity",
        licence="no single licence: cite",
        citation="Gayvert et al., Cell Chem Biol 23 (2016), in MoleculeNet, Wu et al., Chem Sci 9 (2018),",
        page="moleculenet.org",
        kind="molecules",
        downloads=(
            Download(
                f"{_MOLECULES}/clintox.csv.gz",
                "clintox.csv.gz",
                "md5:db4f2df08be8ae92814e9d6a2d015284",
                "several independent records of this file",
                1 << 22,
            ),
        ),
        needs=(("clintox.csv",), ("clintox.csv.gz",)),
    ),
}


def data_folder() -> Path | None:
    """The folder that ``MEDFED_DATA`` names, if it names one."""
    named = os.environ.get("MEDFED_DATA", "")
    return Path(named) if named else None


def find(files: Files, name: str) -> tuple[Path, ...]:
    """The files of a data set, the first way of having it that is there. Raises ``DataError`` MF-320 if none is."""
    dataset, folder = DATASETS[name], data_folder()
    if folder is None:
        raise DataError(
            320,
            f"the {name} data are not bundled with medfed",
            f"medfed-simulate fetch {name} --to DIR, then set MEDFED_DATA to DIR",
        )
    for way in dataset.needs:
        paths = tuple(folder / dataset.folder / one for one in way)
        if all(files.exists(path) for path in paths):
            return paths
    raise DataError(
        320,
        f"the {name} data are not in {dataset.folder} of the folder that MEDFED_DATA names",
        f"medfed-simulate fetch {name}, or set MEDFED_DATA to the folder that holds {dataset.folder}",
    )


def read_arrays(files: Files, path: Path, wanted: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    """Named arrays of an npz file; nothing in it can become code. Raises ``DataError`` MF-301 if it holds something else."""
    import numpy as np

    arrays: dict[str, NDArray[np.generic]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(files.read(path, limit_bytes=_LIMIT_BYTES))) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()[:_MOST_ARRAYS]}
            for name in wanted:
                if sizes[f"{name}.npy"] > _LIMIT_BYTES:
                    raise ValueError("too large")
                with archive.open(f"{name}.npy") as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise DataError(301, f"{path.name} is not the file it should be", "fetch it again") from error
    return arrays
