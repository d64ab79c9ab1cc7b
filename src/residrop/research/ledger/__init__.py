"""The ledger: what was measured, as JSON documents of one schema in one folder (`results/`).

A document says what was measured, how to repeat it, when, where, with which versions, and holds entries of two kinds:

- "paper": one number of a paper, measured; one value per seed. Entries that differ in recipe, variant, scale or device
  are never merged, so a number of a shortened training stays apart from one at full length.
- "measurement": anything else, as flat scalars and lists, under the names that whoever measured chose.

`record` writes paper entries and curves of figures, `document` makes a document of rows that a benchmark has measured,
`read` gives all entries of a folder, `pooled` those of several documents as one, `check` says what is wrong with a
document.
"""

from residrop.common.extras import extra

with extra("research"):
    from residrop.research.ledger.documents import describe_device as describe_device
    from residrop.research.ledger.documents import document as document
    from residrop.research.ledger.documents import flat as flat
    from residrop.research.ledger.documents import of_rows as of_rows
    from residrop.research.ledger.documents import save as save
    from residrop.research.ledger.pooled import pooled as pooled
    from residrop.research.ledger.records import load as load
    from residrop.research.ledger.records import read as read
    from residrop.research.ledger.records import record as record
    from residrop.research.ledger.schema import SCHEMA as SCHEMA
    from residrop.research.ledger.schema import check as check
    from residrop.research.ledger.schema import identity as identity
