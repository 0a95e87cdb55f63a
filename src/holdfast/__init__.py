"""holdfast: reliable messaging for Python, and an order engine on top of it. These are the toolkit's public names."""

from holdfast.db.connect import connect
from holdfast.db.database import Database, Tx
from holdfast.db.migrate import migrate
from holdfast.errors import HoldfastError, PublishRejected, PublishUnconfirmed, Unroutable
from holdfast.messaging.enlist import ConnectionInbox, ConnectionOutbox
from holdfast.messaging.listener import Incoming, Listen
from holdfast.messaging.outbox import Draft, Outbox
from holdfast.messaging.publisher import Publisher
from holdfast.messaging.retry import Reject, Retry, RetryPolicy
from holdfast.messaging.tables import HISTORY
from holdfast.messaging.toolkit import Messaging, open_messaging
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.settings import DatabaseSettings, MessagingSettings

__all__ = [
    "HISTORY",
    "Binding",
    "ConnectionInbox",
    "ConnectionOutbox",
    "Database",
    "DatabaseSettings",
    "Draft",
    "Exchange",
    "HoldfastError",
    "Incoming",
    "Listen",
    "Messaging",
    "MessagingSettings",
    "Outbox",
    "PublishRejected",
    "PublishUnconfirmed",
    "Publisher",
    "Queue",
    "Reject",
    "Retry",
    "RetryPolicy",
    "Topology",
    "Tx",
    "Unroutable",
    "connect",
    "migrate",
    "open_messaging",
]
