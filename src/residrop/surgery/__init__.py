"""The rules on models that nobody here wrote: `apply` puts a model's blocks under them, `remove` takes them away."""

from residrop.surgery.apply import apply as apply
from residrop.surgery.apply import remove as remove
from residrop.surgery.report import Entry as Entry
from residrop.surgery.report import Report as Report
