# SPDX-License-Identifier: Apache-2.0
"""Read stored spans: terminal waterfall (:mod:`.terminal`, needs rich), summary, HTML page."""

from traced_retry.report.html import write_html as write_html
from traced_retry.report.model import Attempt as Attempt
from traced_retry.report.model import Reply as Reply
from traced_retry.report.model import Wait as Wait
from traced_retry.report.read import Replies as Replies
from traced_retry.report.read import ReplyStream as ReplyStream
from traced_retry.report.read import ReportError as ReportError
from traced_retry.report.read import read as read
from traced_retry.report.selection import Newest as Newest
from traced_retry.report.selection import Selection as Selection
from traced_retry.report.selection import parse_since as parse_since
from traced_retry.report.sentence import sentence as sentence
from traced_retry.report.summary import ProviderSummary as ProviderSummary
from traced_retry.report.summary import Summary as Summary
from traced_retry.report.summary import as_dict as as_dict
from traced_retry.report.summary import summarize as summarize
