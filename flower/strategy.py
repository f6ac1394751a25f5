"""Flower's FedAvg, except that clients are drawn and uploads averaged as in `fedu.py`; DAPU is each client's own decision."""

import json
import math
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from messages import FINAL, SENT_OPTIONS, Answer, NotFinite, read_answer, read_introduction, read_receipt
from parties import FILE, Party, party_of, read_parties

import fedu
from federation import Federation, Turn, draw_turns, most_uploads, sample_clients
from options import Options
from report.progress import duration
from report.round import describe_round, name_outliers
from runtime.cli import InputError
from runtime.uploads import Uploads

ANSWER = 300  # seconds that a round waits for a node to say who it is
SILENCE = 30  # seconds without any answer, after which nodes that are still awaited are asked whether they have lost their message
ALIVE = f"{MessageType.QUERY}.alive"  # the type of this question
PATIENCE = 5  # rounds in a row without an upload that can be taken, after which the run ends
POLL = 3  # seconds between two looks for answers, as in Flower's own `send_and_receive`
NEWS = 60  # seconds between two lines about a round that goes on


class Question(NamedTuple):
    """A node that was asked who it is, and when, by `time.monotonic`."""

    node: int
    asked: float


class FedU(FedAvg):
    """A run's strategy. run: its name at the clients; min_clients: how many a round waits for; timeout: seconds for an upload.

    max_share: the largest share of a mean that one of three or more clients can have, however many images it says that it has.
    """

    def __init__(self, options: Options, federation: Federation, run: str, min_clients: int, timeout: float, max_share: float):
        super().__init__(fraction_evaluate=0.0, min_available_nodes=min_clients)
        self.options, self.federation, self.timeout, self.max_share = options, federation, timeout, max_share
        self.server, self.clients = federation.servers[0], federation.clients
        sent = json.dumps({name: getattr(options, name) for name in SENT_OPTIONS})
        self.message_config = {"options": sent, "run": run, "image-size": federation.images.shape[-1]}
        self.sent = federation.networks.sent
        self.num_floats = int(self.sent.sum())
        most, nothing = most_uploads(federation.servers, options.clients_per_round), torch.empty(0, 2, dtype=torch.int64)
        judged = {"max_drift": options.max_drift, "shorten": options.on_outlier == "clip"}
        self.uploads = Uploads(self.server.model, most, nothing, **judged)  # clients measure their divergence themselves
        self.nodes: dict[int, int] = {}  # the node of each connected client
        self.present: set[int] = set()  # the nodes that were connected when a round last looked
        self.refused: set[int] = set()  # those that are not asked again in this round
        self.questions: dict[str, Question] = {}  # those that are not answered, by their messages
        self.parties = read_parties()
        if self.parties is None:
            print(f"{FILE} is not here, so any registered node may say that it is any client", file=sys.stderr, flush=True)
        self.wrong = ""  # what was wrong with the file when it was last read
        self.keys: dict[int, bytes] = {}  # the public key of each node
        self.counts: dict[int, int] = {}  # how many images each client last said that it has
        self.skipped = 0  # how many rounds in a row had no upload that could be taken

    def make_round(self, grid: Grid, round_: int) -> dict:
        """Make a round and return its metrics, as `fedu.run_round` does."""
        clock = time.perf_counter()
        messages = self.configure_train(round_ + 1, self.global_model(), ConfigRecord(), grid)
        self.aggregate_train(round_ + 1, self.exchange(grid, messages))
        return self.row | {"seconds": round(time.perf_counter() - clock, 2)}

    def exchange(self, grid: Grid, messages: list[Message]) -> list[Message]:
        """Send a round's messages; returns the answers of those that answer within the timeout.

        A message is delivered once. A node that is killed while it trains, and is back before Flower finds it missing, has lost its
        message, and Flower does not report this. But a node handles its messages one after the other: if it answers a later question
        and not the message, it has lost the message, and the round does not wait for it.
        """
        awaited = {key: message.metadata.dst_node_id for key, message in zip(grid.push_messages(messages), messages)}
        questions: dict[str, str] = {}  # the message that each question asks about
        replies: list[Message] = []
        heard = began = told = time.monotonic()
        while True:
            came = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages([*awaited, *questions])}
            replies += [came[key] for key in awaited if key in came]
            lost = {key for question, key in questions.items() if question in came}
            awaited = {key: node for key, node in awaited.items() if key not in came and key not in lost}
            questions = {question: key for question, key in questions.items() if key in awaited}
            now = time.monotonic()
            heard = now if came else heard
            if not awaited or now - began >= self.timeout:
                return replies
            if now - told >= NEWS:
                names = ", ".join(str(client) for client, node in sorted(self.nodes.items()) if node in awaited.values())
                print(f"  {len(replies)} of {len(messages)} answers after {duration(now - began)}; awaited: {names}", flush=True)
                told = now
            if now - heard >= SILENCE:
                silent = [key for key in awaited if key not in questions.values()]
                asked = [Message(RecordDict(), dst_node_id=awaited[key], message_type=ALIVE) for key in silent]
                questions |= zip(grid.push_messages(asked), silent)
            time.sleep(POLL)

    def global_model(self) -> ArrayRecord:
        """What clients download: what is sent of the model."""
        return ArrayRecord({"model": Array(self.server.model[self.sent].cpu().numpy())})

    def roll_call(self, grid: Grid, drawn: set[int]) -> None:
        """Ask nodes who they are, until as many clients as a round needs are connected, and one of those drawn among them.

        A round waits `ANSWER` seconds for each node that it has asked. Then it asks again, because the node may have been killed with the
        question, and goes on without it if it can. An answer to an older question counts too: a node may be busy with hours of training.
        """
        self.present, self.refused, told = set(), set(), time.monotonic()
        while True:
            self.ask(grid, self.unknown_nodes(grid))
            self.hear(grid)
            now = time.monotonic()
            if len(self.nodes) >= self.min_available_nodes and drawn & self.nodes.keys() and not self.awaits_answers(now):
                return
            if now - told >= NEWS:
                absent = ", ".join(str(client) for client in sorted(set(range(len(self.clients))) - self.nodes.keys()))
                print(f"  {len(self.nodes)} clients are here, a round waits for {self.min_available_nodes}; absent: {absent}", flush=True)
                told = now
            time.sleep(1)

    def unknown_nodes(self, grid: Grid) -> set[int]:
        """The connected nodes that are no client yet. Nodes that are gone, or lost their key, are clients no longer."""
        self.keys = {node.node_id: node.public_key for node in grid.get_nodes()}
        present, bound = set(self.keys), self.reread_parties()
        if self.present - present or bound:
            self.refused = set()  # a refused node may take the place of a lost one, so all are asked again
        self.present = present
        self.nodes = {client: node for client, node in self.nodes.items() if node in present and self.may_be(node, client)}
        return present - set(self.nodes.values())

    def ask(self, grid: Grid, unknown: set[int]) -> None:
        """Ask these nodes who they are, except those that were refused or asked within `ANSWER` seconds."""
        now = time.monotonic()
        self.questions = {key: question for key, question in self.questions.items() if question.node in unknown}
        lately = {question.node for question in self.questions.values() if now - question.asked < ANSWER}
        nodes = sorted(unknown - self.refused - lately)
        content = RecordDict({"config": ConfigRecord(self.message_config)})
        questions = [Message(content, dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
        keys = grid.push_messages(questions) if questions else ()
        self.questions |= {key: Question(node, now) for key, node in zip(keys, nodes) if key}

    def hear(self, grid: Grid) -> None:
        """Take the nodes in that have said who they are, or note that they are refused."""
        for reply in grid.pull_messages(list(self.questions)) if self.questions else ():
            node = self.questions.pop(reply.metadata.reply_to_message_id).node
            lost = reply.metadata.src_node_id != node  # then the SuperLink says so
            if not lost and node not in self.nodes.values() and not self.introduce(reply):
                self.refused.add(node)

    def awaits_answers(self, now: float) -> bool:
        """Whether a node may still say who it is within `ANSWER` seconds of the first question."""
        first = {question.node: question.asked for question in reversed(self.questions.values())}
        return any(now - asked < ANSWER for node, asked in first.items() if node not in self.nodes.values())

    def reread_parties(self) -> bool:
        """Read parties.json anew, which may change during a run; returns whether it did. If it is lost or damaged, the parties stay."""
        if self.parties is None:
            return False
        before, wrong = self.parties, ""
        try:
            if (read := read_parties()) is None:
                raise InputError(f"{FILE} is no longer here")
            self.parties = read
        except InputError as error:
            wrong = str(error)
        if wrong and wrong != self.wrong:
            print(f"{wrong}: the parties stay those that it had", file=sys.stderr, flush=True)
        self.wrong = wrong
        return self.parties != before

    def party(self, node: int) -> Party | None:
        """The party of a node's key."""
        return party_of(self.parties or [], self.keys.get(node, b""))

    def may_be(self, node: int, client: int) -> bool:
        """Whether a node can be this client, by its key."""
        party = self.party(node)
        return self.parties is None or (party is not None and party.client == client)

    def introduce(self, reply: Message) -> bool:
        """Take a node in as the client that it says it is, unless another node is that client. Returns whether it was taken in."""
        node = reply.metadata.src_node_id
        try:
            client, count = read_introduction(reply, self.options)
            if self.parties is not None and not self.may_be(node, client):
                party = self.party(node)
                whose = f"that of client {party.client} ({party.name})" if party else f"not in {FILE}"
                raise InputError(f"it says that it is client {client}, and its key is {whose}")
            if client in self.nodes:
                raise InputError(f"client {client} is node {self.nodes[client]}")
        except InputError as error:
            print(f"node {node} was refused: {error}", file=sys.stderr, flush=True)
            return False
        party = self.party(node)
        if party and party.images and count > party.images:
            claim = f"client {client} ({party.name}) says that it has {count} images"
            print(f"{claim}, of which {party.images} count ({FILE})", file=sys.stderr, flush=True)
            count = party.images
        if (before := self.counts.get(client, count)) != count:
            print(f"client {client} now says that it has {count} images, and said {before} before", file=sys.stderr, flush=True)
        self.counts[client] = count
        self.nodes[client], self.clients[client].indices = node, torch.empty(count, device="meta")
        here = f"{len(self.nodes)} here, a round waits for {self.min_available_nodes}"
        name = f" ({party.name})" if party else ""
        print(f"client {client}{name} is node {node} and has {count} images ({here})", flush=True)
        return True

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """A message for each client that is drawn and connected. Flower counts rounds from 1, `fedu.py` from 0."""
        round_ = server_round - 1
        self.drawn = sample_clients(len(self.clients), self.options.clients_per_round, self.options.seed, round_)
        self.roll_call(grid, self.drawn)
        turns, _ = draw_turns(self.federation.servers, self.options, round_)
        self.turns = [turn for turn in turns if turn.client.id in self.nodes]
        messages = []
        for turn in self.turns:
            last_round = -1 if turn.client.last_round is None else turn.client.last_round
            config = ConfigRecord(self.message_config | {"round": round_, "last-round": last_round})
            content, node = RecordDict({"model": arrays, "config": config}), self.nodes[turn.client.id]
            messages.append(Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(server_round)))
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the server's rule makes of the uploads that can be taken becomes its model.

        Without any such upload the model stays, and the round is skipped. Raises InputError after `PATIENCE` of such rounds in a row, and
        if an upload is not finite and `on_nonfinite` is `error`.
        """
        round_, server = server_round - 1, self.server
        answers, left_out = self.read_answers({reply.metadata.src_node_id: reply for reply in replies})
        for client, error in left_out.items():
            print(f"round {round_}: client {client} was left out: {error}", file=sys.stderr, flush=True)
        nonfinite = {client for client, error in left_out.items() if isinstance(error, NotFinite)}
        uploaded = [turn for turn in self.turns if turn.client.id in answers]
        for turn, share in zip(uploaded, self.shares(round_, uploaded)):
            answer = answers[turn.client.id]
            self.uploads.next_row().copy_(server.model)[self.sent] = answer.upload.to(server.model)
            self.uploads.add(share, server.model)
            turn.loss, turn.start = answer.loss, answer.start
        for k, outlier in self.uploads.judge().items():
            uploaded[k].outlier = outlier
        outliers = name_outliers(round_, uploaded, self.options.max_drift)

        reported = sorted((turn for turn in uploaded if turn.taken), key=lambda turn: turn.client.id)
        self.skipped = 0 if reported else self.skipped + 1
        if self.skipped == PATIENCE or (nonfinite and self.options.on_nonfinite == "error"):
            reasons = "; ".join(f"client {client}: {error}" for client, error in left_out.items())
            raise InputError(f"round {round_} cannot be made: {reasons or 'every upload moved too far'}")
        if reported:
            networks = self.federation.networks
            server.take(fedu.next_model(self.options, server, self.uploads, networks, []), networks.unsent)
        else:
            print(f"round {round_} was skipped, and the model stays: no client's upload can be taken", file=sys.stderr, flush=True)
        self.uploads.close()
        for turn in reported:
            turn.client.divergence, turn.client.last_round = answers[turn.client.id].divergence, round_
        size, absent = self.num_floats * server.model.itemsize, self.drawn - answers.keys() - nonfinite
        self.row = describe_round(self.options, round_, reported, absent, nonfinite, outliers)
        self.row |= {"upload_bytes": size * len(reported), "download_bytes": size * len(self.turns)}
        return self.global_model(), None

    def read_answers(self, replies: dict[int, Message]) -> tuple[dict[int, Answer], dict[int, InputError]]:
        """What the round's clients answered, and what is wrong with the answers of the others. replies: of each node."""
        answers, left_out = {}, {}
        for turn in self.turns:
            client = turn.client.id
            try:
                answers[client] = read_answer(arrived(replies, self.nodes[client]), self.options, self.num_floats)
            except InputError as error:
                left_out[client] = error
        return answers, left_out

    def hand_out(self, grid: Grid) -> None:
        """Send the last model to the clients that took part, which make their own encoders of it, and name on stderr those that do not."""
        self.reread_parties()
        takers = [client for client in self.clients if client.last_round is not None]
        model, messages = self.global_model(), []
        for client in takers:
            node = self.nodes.get(client.id)
            if node is not None and self.may_be(node, client.id):
                config = ConfigRecord(self.message_config | {"last-round": client.last_round})
                content = RecordDict({"model": model, "config": config})
                messages.append(Message(content, dst_node_id=node, message_type=f"{MessageType.QUERY}.{FINAL}"))
        replies = {reply.metadata.src_node_id: reply for reply in (self.exchange(grid, messages) if messages else ())}
        for client in takers:
            try:
                read_receipt(arrived(replies, self.nodes.get(client.id)))
            except InputError as error:
                print(f"client {client.id} lacks its encoder, which a resumed run sends again: {error}", file=sys.stderr, flush=True)

    def shares(self, round_: int, reported: list[Turn]) -> list[float]:
        """The weight of each client's upload, n_k / n, of which nobody has more than `max_share` if there are three or more."""
        total = sum(turn.client.num_examples for turn in reported)
        for turn in reported:
            turn.total = total
        claimed = [turn.fraction for turn in reported]
        shares = capped(claimed, self.max_share) if len(claimed) > 2 else claimed
        for turn, claim, share in zip(reported, claimed, shares):
            if share < claim:
                sentence = f"client {turn.client.id} says that it has {claim:.1%} of the images, and weighs {share:.1%} (max-share)"
                print(f"round {round_}: {sentence}", file=sys.stderr, flush=True)
        return shares


def arrived(replies: dict[int, Message], node: int | None) -> Message:
    """A node's reply. Raises InputError if there is none."""
    if node not in replies:
        raise InputError("its node was lost, or did not answer in time")
    return replies[node]


def capped(shares: list[float], most: float) -> list[float]:
    """Shares that add up to 1, none of them above `most`: what exceeds it is dealt to the others in proportion.

    If that leaves too little for 1, all are equal.
    """
    most, over = max(most, 1 / len(shares)), set()
    while True:
        rest = math.fsum(share for k, share in enumerate(shares) if k not in over)
        grown = [share * (1 - most * len(over)) / rest if over and rest else share for share in shares]
        further = {k for k, share in enumerate(grown) if k not in over and share > most}
        if not further:
            return [most if k in over else share for k, share in enumerate(grown)]
        over |= further
