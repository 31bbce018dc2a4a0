"""Filters select the rows that TileDB-SOMA selects, also where values are missing."""

import pyarrow as pa
import pytest
import tiledbsoma

from data_ingest.filter_grammar import without_not
from data_ingest.filter_rows import matching
from data_ingest.filters import check_filter, read_filtered

TEXT, CATEGORY = pa.large_string(), pa.dictionary(pa.int8(), pa.large_string())
COLUMNS = {
    "text": (TEXT, ["a", "b", None, "a", "", None]),
    "category": (CATEGORY, ["x", None, "y", "x", "z", None]),
    "whole": (pa.int32(), [1, None, 3, -4, 5, None]),
    "number": (pa.float32(), [0.1, 0.2, None, 0.4, None, 3]),
    "flag": (pa.bool_(), [True, None, False, True, None, False]),
}
FILTERS = """
text == 'a' | text != 'a' | text < 'b' | text in ['a', ''] | text not in ['a'] | text == None | text != None
category == 'x' | category != 'x' | category in ['x', 'z'] | category not in ['x'] | category == None
whole == 1 | whole != 1 | whole > 1 | 1 < whole <= 3 | 3 >= whole | whole in [1, 3] | whole not in [1]
number == 0.1 | number >= 0.2 | number != 0.1 | number > -1 | 0.1 < number
flag == True | flag != True | flag == None | attr('flag') == val(True)
not (text == 'a') | not (category in ['x']) | not (1 < whole <= 3) | not (not (whole == 1))
not (text == 'a' or whole > 1) | text == 'a' and (number < 0.3 or flag == True) | (whole > 1) & (flag != None)
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("filters") / "table")
    fields = [pa.field(name, kind, nullable=True) for name, (kind, _) in COLUMNS.items()]
    schema = pa.schema([pa.field("soma_joinid", pa.int64(), nullable=False), *fields])
    arrays = [
        pa.array(values, TEXT).dictionary_encode().cast(kind) if kind == CATEGORY else pa.array(values, kind)
        for kind, values in COLUMNS.values()
    ]
    with tiledbsoma.DataFrame.create(uri, schema=schema, domain=[(0, 5)]) as frame:
        frame.write(pa.table([pa.array(range(6), pa.int64()), *arrays], schema=schema))
    with tiledbsoma.open(uri) as frame:
        yield frame


@pytest.mark.parametrize(
    "condition", [text.strip() for text in FILTERS.replace("\n", "|").split("|") if text.strip()]
)
def test_the_rows_are_those_of_soma(table, condition):
    check_filter(condition, table, "filter")
    expected = table.read(value_filter=without_not(condition)).concat()["soma_joinid"].to_pylist()
    assert read_filtered(table, condition, ["soma_joinid"], "filter")["soma_joinid"].tolist() == expected
    rows = table.read().concat()
    assert rows.filter(matching(condition, rows))["soma_joinid"].to_pylist() == expected


def test_no_row_and_no_filter(table):
    assert len(read_filtered(table, "whole == 77", ["soma_joinid", "category"], "filter")) == 0
    assert len(read_filtered(table, "", ["soma_joinid", "category"], "filter")) == 6


def test_categories_have_no_order(table):
    """SOMA refuses it in the middle of the read."""
    with pytest.raises(ValueError, match="filter: category is categorical, without an order"):
        check_filter("category < 'y'", table, "filter")
