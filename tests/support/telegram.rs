//! What Telegram does with a call: its queue of updates, its chats and its limits, as the published server
//! (tdlib/telegram-bot-api, `Client.cpp`) and the documentation have them.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::bot_api::{Fault, Sent, State, When};

/// A `getUpdates` with the offset of the one before, which began less than this ago, is held as a long poll.
const HOLD: Duration = Duration::from_secs(3);
/// ... and less than this ago, it gets a single update.
const ONE_UPDATE: Duration = Duration::from_millis(500);
/// A second 409 within this time comes only after it.
pub const CONFLICT_PAUSE: Duration = Duration::from_secs(3);
/// Of JSON in a page of updates (`JsonUpdates`).
const PAGE_MAX: usize = 1 << 22;
/// A message in characters, after the entities are taken out.
const TEXT_MAX: usize = 4096;

const WEBHOOK_IS_SET: &str = "Conflict: can't use getUpdates method while webhook is active; \
    use deleteWebhook to delete the webhook first";
const WEBHOOK_WAS_SET: &str = "Conflict: terminated by setWebhook request";
pub const OTHER_POLL: &str = "Conflict: terminated by other getUpdates request; \
    make sure that only one bot instance is running";

/// Why nothing can be sent to a chat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Blocked,
    KickedFromGroup,
    NotFound,
    /// The group became the supergroup with this id.
    MigratedTo(i64),
}

impl Refusal {
    fn answer(self) -> Answer {
        let forbidden = |reason: &str| Answer::error(403, &format!("Forbidden: {reason}"));
        match self {
            Self::Blocked => forbidden("bot was blocked by the user"),
            Self::KickedFromGroup => forbidden("bot was kicked from the group chat"),
            Self::NotFound => Answer::error(400, "Bad Request: chat not found"),
            Self::MigratedTo(id) => Answer::error_with(
                400,
                "Bad Request: group chat was upgraded to a supergroup chat",
                json!({"migrate_to_chat_id": id}),
            ),
        }
    }

    /// Telegram finds out about a person when it delivers a text, about a chat at every call.
    fn only_of_texts(self) -> bool {
        self == Self::Blocked
    }
}

/// JSON as Telegram writes it: what is not ASCII as `\uXXXX`, an emoji as two of them.
fn ascii(value: &Value) -> String {
    let mut text = String::new();
    for c in value.to_string().chars() {
        if c.is_ascii() {
            text.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            text += &format!("\\u{unit:04x}");
        }
    }
    text
}

/// A status and a body.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    fn success(result: Value) -> Self {
        Self {
            status: 200,
            body: ascii(&json!({"ok": true, "result": result})),
        }
    }

    /// Updates as Telegram writes them: the id of each comes first.
    fn page(updates: &[Value]) -> Self {
        let mut written = Vec::new();
        for update in updates {
            let mut rest = update.clone();
            let fields = rest.as_object_mut();
            let id = fields.and_then(|fields| fields.remove("update_id"));
            let rest = ascii(&rest);
            written.push(match id {
                Some(id) if rest != "{}" => format!("{{\"update_id\":{id},{}", &rest[1..]),
                _ => ascii(update),
            });
        }
        let body = format!("{{\"ok\":true,\"result\":[{}]}}", written.join(","));
        Self { status: 200, body }
    }

    pub fn error(status: u16, description: &str) -> Self {
        let body = json!({"ok": false, "error_code": status, "description": description});
        Self {
            status,
            body: body.to_string(),
        }
    }

    fn error_with(status: u16, description: &str, parameters: Value) -> Self {
        let body = json!({"ok": false, "error_code": status, "description": description,
            "parameters": parameters});
        Self {
            status,
            body: body.to_string(),
        }
    }

    pub fn too_many_requests(retry_after: u64) -> Self {
        Self::error_with(
            429,
            &format!("Too Many Requests: retry after {retry_after}"),
            json!({"retry_after": retry_after}),
        )
    }
}

/// What becomes of a call.
pub enum Outcome {
    Answered(Answer),
    /// Answered after [`CONFLICT_PAUSE`].
    Delayed(Answer),
    Held(LongPoll),
}

/// A `getUpdates` that waits for an update.
pub struct LongPoll {
    pub number: usize,
    pub until: Instant,
    offset: i64,
    limit: usize,
}

/// What Telegram remembers about the `getUpdates` calls of the bot.
#[derive(Default)]
pub struct Polls {
    previous: Option<PreviousPoll>,
    /// Number of the one that is held.
    held: Option<usize>,
    count: usize,
    /// A 409 before this time is delayed.
    next_conflict: Option<Instant>,
    pub webhook: bool,
}

struct PreviousPoll {
    offset: i64,
    began: Instant,
}

/// At most so many texts in any span of this length.
struct Limit {
    texts: usize,
    span: Duration,
}

/// One text a second after a short burst.
const OF_A_CHAT: Limit = Limit {
    texts: 3,
    span: Duration::from_secs(3),
};
const OF_A_GROUP: Limit = Limit {
    texts: 20,
    span: Duration::from_secs(60),
};
const OF_THE_BOT: Limit = Limit {
    texts: 30,
    span: Duration::from_secs(1),
};

impl Limit {
    /// How long a text has to wait after those that were sent at these times.
    fn wait(&self, sent: &[Instant], now: Instant) -> Duration {
        match sent.len().checked_sub(self.texts) {
            Some(oldest) => (sent[oldest] + self.span).saturating_duration_since(now),
            None => Duration::ZERO,
        }
    }
}

/// When texts were sent; too fast a bot is refused.
#[derive(Default)]
pub struct Pace {
    by_the_bot: Vec<Instant>,
    to_chats: HashMap<String, Vec<Instant>>,
}

impl Pace {
    /// Counts a text; or says in how many seconds it may be sent.
    pub fn count(&mut self, chat: &str, now: Instant) -> Result<(), u64> {
        let to_chat = self.to_chats.entry(chat.to_string()).or_default();
        let mut wait = OF_THE_BOT
            .wait(&self.by_the_bot, now)
            .max(OF_A_CHAT.wait(to_chat, now));
        if chat.starts_with(['-', '@']) {
            wait = wait.max(OF_A_GROUP.wait(to_chat, now));
        }
        if !wait.is_zero() {
            return Err(wait.as_millis().div_ceil(1000) as u64);
        }
        to_chat.push(now);
        self.by_the_bot.push(now);
        Ok(())
    }
}

pub fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs() as i64
}

/// A parameter as an integer, which may also come as text.
fn integer(parameters: &Map<String, Value>, name: &str) -> Option<i64> {
    let value = parameters.get(name)?;
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

fn chat_of(parameters: &Map<String, Value>) -> Option<String> {
    match parameters.get("chat_id")? {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// Digits, a colon and the secret part, as BotFather writes them.
fn well_formed(token: &str) -> bool {
    let secret_ok = |secret: &str| {
        secret.len() >= 30
            && secret
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
    };
    token
        .split_once(':')
        .is_some_and(|(id, secret)| id.parse::<u64>().is_ok() && secret_ok(secret))
}

impl State {
    pub fn message_id(&mut self) -> i64 {
        self.next_message_id += 1;
        self.next_message_id - 1
    }

    pub fn push(&mut self, mut update: Value) {
        let allowed =
            |kind: &String| self.allowed_updates.is_empty() || self.allowed_updates.contains(kind);
        let kinds = update.as_object().expect("an update is a JSON object");
        if !kinds.keys().any(|kind| kind == "update_id") {
            if !kinds.is_empty() && !kinds.keys().any(allowed) {
                return; // Telegram does not keep what nobody wants
            }
            update["update_id"] = json!(self.next_update_id);
            self.next_update_id += 1;
        }
        self.updates.push_back(update);
    }

    pub fn carry_out(
        &mut self,
        method: &str,
        token: &str,
        parameters: &Map<String, Value>,
    ) -> Outcome {
        if !well_formed(token) {
            return Outcome::Answered(Answer::error(404, "Not Found"));
        }
        if token != self.token {
            return Outcome::Answered(Answer::error(401, "Unauthorized"));
        }
        Outcome::Answered(match method {
            "getUpdates" => return self.get_updates(parameters),
            "getMe" => Answer::success(
                json!({"id": 123_456_789, "is_bot": true, "first_name": "RIOT mote",
                "username": "riot_mote_bot", "can_join_groups": true, "can_read_all_group_messages": false,
                "supports_inline_queries": false}),
            ),
            "sendMessage" => self.send_message(parameters),
            "deleteMessage" => self.delete_message(parameters),
            _ => Answer::error(404, "Not Found"),
        })
    }

    /// `Client::process_get_updates_query` and `Client::do_get_updates`.
    fn get_updates(&mut self, parameters: &Map<String, Value>) -> Outcome {
        if self.polls.webhook {
            return self.conflict(WEBHOOK_IS_SET);
        }
        if let Some(kinds) = parameters.get("allowed_updates") {
            let text = kinds.as_str().unwrap_or_default(); // in a query: JSON as text
            let kinds = serde_json::from_str(text).unwrap_or_else(|_| kinds.clone());
            let Ok(kinds) = serde_json::from_value(kinds) else {
                return Outcome::Answered(Answer::error(
                    400,
                    "Bad Request: can't parse allowed updates JSON object",
                ));
            };
            self.allowed_updates = kinds;
        }
        let number = |name, default| integer(parameters, name).unwrap_or(default);
        let offset = number("offset", 0);
        let mut limit = number("limit", 100).clamp(1, 100) as usize;
        let mut timeout = Duration::from_secs(number("timeout", 0).clamp(0, 50) as u64);

        let began = Instant::now();
        if let Some(previous) = &self.polls.previous
            && previous.offset == offset
        {
            let since = began - previous.began;
            if since < HOLD {
                timeout = timeout.max(HOLD);
            }
            if since < ONE_UPDATE {
                limit = 1;
            }
        }
        self.polls.previous = Some(PreviousPoll { offset, began });

        let offset = self.confirm(offset);
        let page = self.page(offset, limit);
        if timeout.is_zero() || !page.is_empty() {
            return Outcome::Answered(Answer::page(&page));
        }
        self.polls.count += 1;
        self.polls.held = Some(self.polls.count); // what was held before ends with a 409
        Outcome::Held(LongPoll {
            number: self.polls.count,
            until: began + timeout,
            offset,
            limit,
        })
    }

    /// A negative offset leaves so many updates. Returns the offset from which the page begins.
    fn confirm(&mut self, offset: i64) -> i64 {
        if offset < 0 {
            let keep = usize::try_from(-offset).unwrap();
            let forgotten = self.updates.len().saturating_sub(keep);
            self.updates.drain(..forgotten);
        }
        offset.max(0)
    }

    /// Forgets what is below the offset, and gives what comes then. Ignores an offset that is further in the future
    /// than 10, as the real server does.
    fn page(&mut self, offset: i64, limit: usize) -> Vec<Value> {
        if offset <= self.next_update_id + 10 {
            self.updates
                .retain(|update| update["update_id"].as_i64().is_none_or(|id| id >= offset));
        }
        let mut left = PAGE_MAX;
        let fits = |update: &&Value| {
            let length = 50 + ascii(update).len();
            left = left.saturating_sub(length);
            left > 0
        };
        self.updates
            .iter()
            .take(limit)
            .take_while(fits)
            .cloned()
            .collect()
    }

    /// True as long as a held call goes on waiting.
    pub fn holds(&self, poll: &LongPoll) -> bool {
        self.polls.held == Some(poll.number) && self.updates.is_empty() && !self.stopped
    }

    /// The end of a held call.
    pub fn release(&mut self, poll: &LongPoll) -> Outcome {
        if self.polls.held != Some(poll.number) {
            let by_webhook = self.polls.webhook;
            return self.conflict(if by_webhook {
                WEBHOOK_WAS_SET
            } else {
                OTHER_POLL
            });
        }
        self.polls.held = None;
        Outcome::Answered(Answer::page(&self.page(poll.offset, poll.limit)))
    }

    pub fn set_webhook(&mut self, on: bool) {
        self.polls.webhook = on;
        if on {
            self.polls.held = None;
        }
    }

    /// `Client::fail_query_conflict`.
    fn conflict(&mut self, description: &str) -> Outcome {
        let answer = Answer::error(409, description);
        let now = Instant::now();
        if self.polls.next_conflict.is_some_and(|next| now < next) {
            return Outcome::Delayed(answer);
        }
        self.polls.next_conflict = Some(now + CONFLICT_PAUSE);
        Outcome::Answered(answer)
    }

    fn send_message(&mut self, parameters: &Map<String, Value>) -> Answer {
        let Some(chat) = chat_of(parameters) else {
            return Answer::error(400, "Bad Request: chat_id is empty");
        };
        if chat.parse::<i64>().is_err() && !chat.starts_with('@') {
            return Refusal::NotFound.answer();
        }
        if let Some(refusal) = self.refusals.get(&chat) {
            return refusal.answer();
        }
        let text = parameters
            .get("text")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if text.trim().is_empty() {
            return Answer::error(400, "Bad Request: message text is empty");
        }
        if text.chars().count() > TEXT_MAX {
            return Answer::error(400, "Bad Request: message is too long");
        }
        if let Some(pace) = &mut self.pace
            && let Err(seconds) = pace.count(&chat, Instant::now())
        {
            return Answer::too_many_requests(seconds);
        }
        let message_id = self.message_id();
        self.seen.sent.push(Sent {
            chat: chat.clone(),
            text: text.to_string(),
        });
        let chat = match chat.parse::<i64>() {
            Ok(id) if id < 0 => json!({"id": id, "type": "supergroup", "title": "Some group"}),
            Ok(id) => json!({"id": id, "type": "private", "first_name": "Somebody"}),
            Err(_) => {
                json!({"id": -1_001_234_567_890_i64, "type": "channel", "username": &chat[1..]})
            }
        };
        Answer::success(
            json!({"message_id": message_id, "chat": chat, "date": now(), "text": text.trim(),
            "from": {"id": 123_456_789, "is_bot": true, "first_name": "RIOT mote", "username": "riot_mote_bot"}}),
        )
    }

    fn delete_message(&mut self, parameters: &Map<String, Value>) -> Answer {
        let Some(chat) = chat_of(parameters) else {
            return Answer::error(400, "Bad Request: chat_id is empty");
        };
        if let Some(refusal) = self.refusals.get(&chat)
            && !refusal.only_of_texts()
        {
            return refusal.answer();
        }
        let message = integer(parameters, "message_id")
            .filter(|id| (1..self.next_message_id).contains(id))
            .map(|id| (chat, id))
            .filter(|message| !self.seen.deleted.contains(message));
        let Some(message) = message else {
            return Answer::error(400, "Bad Request: message to delete not found");
        };
        self.seen.deleted.push(message);
        Answer::success(json!(true))
    }

    /// The first fault planned for this call, counted down.
    pub fn fault(&mut self, method: &str, parameters: &Map<String, Value>) -> Option<Fault> {
        let chat = chat_of(parameters);
        let text = parameters.get("text").and_then(Value::as_str);
        let fits = |when: &When| {
            (when.method.is_empty() || when.method == method)
                && (when.chat.is_none() || when.chat == chat)
                && (when.text.is_none() || when.text.as_deref() == text)
        };
        let at = self.faults.iter().position(|(when, _)| fits(when))?;
        let (when, fault) = &mut self.faults[at];
        when.times = when
            .times
            .saturating_sub(usize::from(when.times != usize::MAX));
        let (spent, fault) = (when.times == 0, fault.clone());
        if spent {
            self.faults.remove(at);
        }
        Some(fault)
    }
}
