"""Which tests make test leaves out."""

from slow_tests import LIST, listed, name_of, slow


def test_long_cases_are_left_out_and_a_quick_one_of_every_function_stays():
    seconds = {"a.f[1]": 5.0, "a.f[2]": 3.0, "a.f[3]": 9.0, "a.g": 1.9, "a.h[x]": 8.1, "a.h[y]": 20.0, "a.i[x]": 1.0}
    assert slow(seconds) == ["a.f[1]", "a.f[3]", "a.h[x]", "a.h[y]"]
    assert slow(seconds | {"a.i[y]": 2.1}) == [*slow(seconds), "a.i[y]"]


def test_names_are_those_of_reports():
    assert name_of("tests/kernels/test_fold.py::test_sums[a/b.py::c]") == "tests.kernels.test_fold.test_sums[a/b.py::c]"
    assert name_of("tests/kernels/test_fold.py::TestFused::test_sums") == "tests.kernels.test_fold.TestFused.test_sums"


def test_the_list_names_tests_of_files_that_exist():
    for name in listed():
        parts = name.partition("[")[0].split(".")
        files = [LIST.parent.joinpath(*parts[1:end]).with_suffix(".py") for end in range(2, len(parts))]
        assert any(file.is_file() and f"def {parts[-1]}(" in file.read_text() for file in files), name
