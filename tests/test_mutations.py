"""The mutations that `make mutants` applies still fit the code that they break."""

from mutations.run import ROOT, load


def test_the_text_of_a_mutation_stands_once_in_its_file():
  for mutation in load([]):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation.name


def test_the_tests_that_must_notice_exist():
  for mutation in load([]):
    path, _, name = mutation.test.partition("::")
    assert f"def {name.partition('[')[0]}".strip() in (ROOT / path).read_text(), mutation.name
