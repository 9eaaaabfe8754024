"""A prepared folder, cut to a few rows a file."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.cut import main


def test_files_keep_a_few_short_rows_spread_over_all(tmp_path, capsys):
    texts = [str(number) * (100 if number % 2 else 1) for number in range(40)]
    for name in ("task/train.parquet", "prompts.parquet"):
        (tmp_path / "of" / name).parent.mkdir(parents=True, exist_ok=True)
        columns = {"prompt": texts} | ({"target": texts} if "/" in name else {"id": texts})
        pq.write_table(pa.table(columns), tmp_path / "of" / name)
    main([f"--of={tmp_path / 'of'}", f"--out={tmp_path / 'out'}", "--rows=5", "--longest=50"])
    assert pq.read_table(tmp_path / "out/task/train.parquet")["target"].to_pylist() == ["0", "8", "16", "24", "32"]
    assert pq.read_table(tmp_path / "out/prompts.parquet").column_names == ["prompt", "id"]
    assert capsys.readouterr().out.splitlines()[1].endswith("task/train.parquet: 5 rows")


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"there are no Parquet files in .*; run make headline-data first, .*\(--of\)"):
        main([f"--of={tmp_path}", f"--out={tmp_path / 'out'}"])
