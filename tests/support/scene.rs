//! A gateway with its Telegram, for tests of what people write.

use std::cell::Cell;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::{BotApi, Gateway, Mote, PATIENCE, Setup, poll, start_with, within};

pub struct Scene {
    pub api: BotApi,
    pub gateway: Gateway,
    motes: Cell<u16>,
    marks: Cell<i64>,
}

impl Scene {
    /// The usual one, after the first fetch. It listens on `127.0.0.1`, so that motes can have addresses of their own.
    pub fn new() -> Self {
        Self::with(|setup| setup)
    }

    pub fn with(change: impl FnOnce(Setup) -> Setup) -> Self {
        let api = BotApi::start();
        let setup = change(Setup::ipv4(&api));
        let gateway = start_with(&api, setup);
        Self::of(api, gateway)
    }

    pub fn of(api: BotApi, gateway: Gateway) -> Self {
        Self {
            api,
            gateway,
            motes: Cell::new(0),
            marks: Cell::new(0),
        }
    }

    /// A mote of which nobody has heard: it is told everything.
    pub fn mote(&self) -> Mote {
        let number = self.motes.get() + 1;
        self.motes.set(number);
        let ip = format!("127.0.{}.{}", 1 + number / 200, 1 + number % 200);
        Mote::at(&ip, self.gateway.address())
    }

    pub fn writes(&self, chat: i64, name: &str, text: &str) -> i64 {
        self.api.person_writes(chat, name, text)
    }

    /// A message with other content than text, see [`BotApi::push_message`].
    pub fn sends(&self, chat: i64, name: &str, content: Value) -> i64 {
        self.api.push_message(chat, name, content)
    }

    /// Waits until all that was written is taken in and answered. A mote asks for it, and the log tells of a group that
    /// wrote last.
    #[track_caller]
    pub fn catch_up(&self) {
        self.marks.set(self.marks.get() + 1);
        let group = -8_000_000 - self.marks.get();
        let chat = json!({"id": group, "type": "group", "title": "Mark"});
        self.sends(1, "Mark", json!({"chat": chat, "text": "mark"}));
        let mote = self.mote();
        let is_seen = within(Duration::from_secs(20), || {
            poll(&mote, &self.api);
            thread::sleep(Duration::from_millis(200));
            self.gateway.log().contains(&group.to_string())
        });
        assert!(is_seen, "what people wrote is not taken in");
        assert!(mote.ping(PATIENCE), "they are not answered");
    }

    /// What a mote is told that knows nothing.
    #[track_caller]
    pub fn tokens(&self) -> String {
        poll(&self.mote(), &self.api)
    }

    /// All that was written to a chat.
    pub fn answers(&self, chat: i64) -> String {
        self.api.texts_to(chat).join("\n\n")
    }
}
