//! The gateway at work, without a Pi, a mote or a bot: `cargo run --example demo`.
//!
//! Starts a stand-in for Telegram's Bot API and the real gateway on loopback, plays a mote and two people, and prints
//! what they say to each other. Ends with an error if anything in the story did not happen.

#[path = "../tests/support/mod.rs"]
mod support;

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;
use std::{env, thread};

use support::{
    ADA, BOB, BotApi, EMPTY_PAGE_HOLDS, Gateway, Message, Mote, PASSWORD, Setup, TOKEN, binary,
    form, update,
};

fn main() -> ExitCode {
    build_gateway();
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::new(&api));
    println!("Telegram's Bot API is played by {}", api.url());
    println!(
        "The gateway listens on          coap://{}",
        gateway.address()
    );
    let mut story = Story {
        mote: Mote::new(gateway.address()),
        api: &api,
        told: 0,
        missing: Vec::new(),
    };
    story.tell();
    let missing = story.missing;
    if missing.is_empty() {
        println!("\nEverything happened as it should.");
        return ExitCode::SUCCESS;
    }
    println!("\nThis did not happen:");
    missing.iter().for_each(|what| println!("  - {what}"));
    println!("\nThe gateway's log:\n{}", gateway.log());
    ExitCode::FAILURE
}

/// Builds the gateway, for `cargo run --example` builds the example alone. Asks cargo at run time where the sources are:
/// two clones with one target folder share this program.
fn build_gateway() {
    let Some(sources) = env::var_os("CARGO_MANIFEST_DIR") else {
        return; // not started by cargo
    };
    let gateway = binary();
    let profile = gateway.parent().expect("target/<profile>/");
    let name = match profile.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(name) => name,
    };
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()));
    // What cargo tells this example about itself would make ring build anew, each time.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(&*name);
        }
    }
    cargo
        .args(["build", "--quiet", "--bin", "coap_websocket"])
        .args(["--profile", name, "--manifest-path"])
        .arg(Path::new(&sources).join("Cargo.toml"))
        .arg("--target-dir")
        .arg(profile.parent().expect("target/"));
    let built = cargo.status().expect("run cargo");
    assert!(built.success(), "the gateway does not build");
}

struct Story<'a> {
    api: &'a BotApi,
    mote: Mote,
    /// How many of the bot's texts were shown.
    told: usize,
    /// What should have happened and did not.
    missing: Vec<String>,
}

impl Story<'_> {
    fn tell(&mut self) {
        title("The mote asks what people want. Nobody has written yet.");
        self.poll("No Updates");

        title("Ada finds the bot. She wants a report every 5 minutes. Bob is curious, too.");
        self.writes(ADA, "Ada", "hello");
        let secret = self.writes(ADA, "Ada", &format!("config {PASSWORD} interval 5"));
        self.writes(BOB, "Bob", "hi");

        title("The mote asks again: another interval, two new users.");
        self.poll("i5;Ada:1234567890;Bob:2345678901");
        self.bot_writes(2);
        let deleted = self
            .api
            .wait_until(Duration::from_secs(5), |seen| !seen.deleted.is_empty());
        self.check(
            deleted && self.api.seen().deleted == [(ADA.to_string(), secret)],
            "the password leaves the chat",
        );
        println!("bot   -> Telegram  deletes Ada's message with the password");

        title("Bob has seen enough. A mote that is told anything is told everything.");
        self.writes(BOB, "Bob", "remove me");
        self.poll("r2345678901;i5;Ada:1234567890");
        self.bot_writes(1);

        title("The mote has acknowledged that, so it need not hear it again.");
        self.poll("No Updates");

        title(
            "The mote reports its temperature to all. Its list is an old one: Bob is still on it.",
        );
        let report = form(
            &self.api.url(),
            TOKEN,
            "1234567890,2345678901",
            "CPU Temperature: 25.00 °C\n",
        );
        let answer = self.exchange("message", &report);
        self.check(answer.code() == "2.05", "the report is accepted");
        self.bot_writes(1);
        let reports = |chat: i64| {
            self.api
                .texts_to(chat)
                .iter()
                .filter(|text| text.contains("25.00 °C"))
                .count()
        };
        let (ada, bob) = (reports(ADA), reports(BOB));
        self.check(ada == 1, "Ada gets the report, once");
        self.check(bob == 0, "Bob gets no report any more");
    }

    fn check(&mut self, happened: bool, what: &str) {
        if !happened {
            self.missing.push(what.to_string());
        }
    }

    /// Somebody writes to the bot.
    fn writes(&self, chat: i64, name: &str, text: &str) -> i64 {
        let shown = text.replace(PASSWORD, "<password>");
        println!("{name:<5} -> bot       {shown}");
        self.api.person_writes(chat, name, text)
    }

    /// Shows what the bot has written since the last time, when it is as much as expected.
    fn bot_writes(&mut self, count: usize) {
        let (known, wanted) = (self.told, self.told + count);
        let came = self
            .api
            .wait_until(Duration::from_secs(5), |seen| seen.sent.len() >= wanted);
        thread::sleep(Duration::from_millis(100)); // time for one too many
        let sent = self.api.seen().sent;
        for sent in &sent[known..] {
            let name = if sent.chat == ADA.to_string() {
                "Ada"
            } else {
                "Bob"
            };
            println!("bot   -> {name:<9} {}", indented(&sent.text));
        }
        self.told = sent.len();
        self.check(
            came && sent.len() == wanted,
            &format!("the bot writes {count} texts (not {})", sent.len() - known),
        );
    }

    /// The mote asks for news, when Telegram may be asked again.
    fn poll(&mut self, expected: &str) {
        thread::sleep(EMPTY_PAGE_HOLDS);
        let answer = self.exchange("update", &update(self.api));
        self.check(
            answer.text() == expected,
            &format!("the mote hears {expected:?}"),
        );
    }

    /// One POST of the mote: the request, the empty ACK, the response when Telegram has answered, and its ACK.
    fn exchange(&self, path: &str, payload: &str) -> Message {
        let request = self.mote.post(path, payload);
        println!("mote  -> gateway   {}", shown(&request));
        self.mote.begin(&request);
        println!("mote  <- gateway   ACK empty [ID {:04x}]", request.id);
        let response = self.mote.response(&request);
        println!("mote  <- gateway   {}", shown(&response));
        self.mote.acknowledge(&response);
        println!("mote  -> gateway   ACK empty [ID {:04x}]", response.id);
        response
    }
}

fn title(text: &str) {
    println!("\n{text}");
}

/// A text as a person sees it: its further lines stand below the first one.
fn indented(text: &str) -> String {
    let below = format!("\n{:19}", "");
    text.replace('\n', &below)
        .replace(&format!("{below}\n"), "\n\n")
}

fn shown(message: &Message) -> String {
    message.to_string().replace(TOKEN, "<bot token>")
}
