"""holdfast: reliable messaging for Python, and an order engine on top of it. These are the toolkit's public names."""

from holdfast.clock import Clock
from holdfast.db.connect import connect
from holdfast.db.database import Database, Tx
from holdfast.db.migrate import migrate
from holdfast.errors import HoldfastError, PublishRejected, PublishUnconfirmed, Unroutable
from holdfast.messaging.codec import Codec
from holdfast.messaging.draft import Draft
from holdfast.messaging.enlist import ConnectionInbox, ConnectionOutbox
from holdfast.messaging.injection import Incoming, PerMessage
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import Delivery, Message
from holdfast.messaging.outbox import Outbox
from holdfast.messaging.publisher import Publisher
from holdfast.messaging.recover import DeadLetter, Discard, Park, Republish, Requeue, error_topology
from holdfast.messaging.retry import Reject, Retry, RetryPolicy
from holdfast.messaging.tables import HISTORY
from holdfast.messaging.toolkit import Messaging, open_messaging
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.settings import DatabaseSettings, MessagingSettings

__all__ = [
    "HISTORY",
    "Binding",
    "Clock",
    "Codec",
    "ConnectionInbox",
    "ConnectionOutbox",
    "Database",
    "DatabaseSettings",
    "DeadLetter",
    "Delivery",
    "Discard",
    "Draft",
    "Exchange",
    "HoldfastError",
    "Incoming",
    "Listen",
    "Message",
    "Messaging",
    "MessagingSettings",
    "Outbox",
    "Park",
    "PerMessage",
    "PublishRejected",
    "PublishUnconfirmed",
    "Publisher",
    "Queue",
    "Reject",
    "Republish",
    "Requeue",
    "Retry",
    "RetryPolicy",
    "Topology",
    "Tx",
    "Unroutable",
    "connect",
    "error_topology",
    "migrate",
    "open_messaging",
]
