"""Long lines, invalid UTF-8, NUL bytes and empty documents in one folder are handled and counted.

The same folder of 50,000 files is a row of `experiments.benchmarks.data_prepare`.
"""

import collections

from data.texts import decoded, prepared

from experiments.benchmarks.odd_folder import LINE_BYTES, write_odd_folder
from moe_jax.data.splits import Split


def test_everything_in_an_odd_folder_is_met_and_kept(tmp_path):
  expected = write_odd_folder(tmp_path / "odd", 608)
  data = prepared(tmp_path / "odd", tmp_path, length=1024)
  met = data.sources[0].manifest.met
  assert met == expected
  assert (met.ignored_files, met.repaired_documents, met.longer_than_context) == (101, 101, 2)
  found = collections.Counter(decoded(data) + decoded(data, Split.HELDOUT))
  long = "ten megabytes " * (LINE_BYTES // 14)
  kept = {"naïve words\n": 101, "a\ufffdb\n": 101, "\0nul\0": 101, "one": 101, "n\0": 101, long: 2}
  assert found == kept
