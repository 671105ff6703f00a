//! The stand-in Bot API as a program, for trying a gateway that runs elsewhere:
//!
//! ```text
//! stand_in --listen ADDR:PORT --ca FILE [--token TOKEN] [--name HOST]...
//! ```
//!
//! It writes its authority's certificate to FILE (the gateway's `SSL_CERT_FILE`), prints `url=https://...` when it is
//! ready, and then one line of JSON for each API call. A `--name` is one more host name in its certificate; the first
//! one is also the host in the printed url. Every chat is known to it. It reads commands, one a line, and serves on
//! when there are no more:
//!
//! ```text
//! say <chat id> <name> <text>    somebody writes to the bot
//! unknown <chat id>              sending there fails with 400, chat not found
//! block <chat id>                sending there fails with 403, bot was blocked
//! hang | portal | heal           calls are not answered any more | by a page of somebody else | are answered again
//! ```

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{self, Write};
use std::time::Duration;
use std::{env, process, thread};

use serde_json::json;
use support::{BotApi, BotApiOptions, Call, Fault, every};

const USAGE: &str = "usage: stand_in --listen ADDR:PORT --ca FILE [--token TOKEN] [--name HOST]...";

fn main() {
    let options = options(env::args().skip(1)).unwrap_or_else(|error| {
        eprintln!("{error}\n{USAGE}");
        process::exit(2);
    });
    let api = BotApi::with(options);
    say(&format!("url={}", api.url()));
    thread::scope(|scope| {
        scope.spawn(|| {
            io::stdin()
                .lines()
                .map_while(Result::ok)
                .for_each(|line| obey(&api, &line))
        });
        let mut shown = 0;
        loop {
            api.wait_until(Duration::from_secs(3600), |seen| seen.calls.len() > shown);
            for call in api.calls_after(shown) {
                say(&describe(&call));
                shown += 1;
            }
        }
    });
}

fn options(mut arguments: impl Iterator<Item = String>) -> Result<BotApiOptions, String> {
    let mut options = BotApiOptions::default();
    let mut listen = false;
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or(format!("{name} needs a value"))?;
        match name.as_str() {
            "--listen" => {
                options.listen = value
                    .parse()
                    .map_err(|_| format!("not ADDR:PORT: {value}"))?;
                listen = true;
            }
            "--ca" => options.ca_path = Some(value.into()),
            "--token" => options.token = value,
            "--name" => options.names.push(value),
            _ => return Err(format!("unknown argument {name}")),
        }
    }
    if listen && options.ca_path.is_some() {
        Ok(options)
    } else {
        Err("--listen and --ca are needed".to_string())
    }
}

fn obey(api: &BotApi, line: &str) {
    let mut words = line.splitn(4, ' ');
    let mut word = || words.next().unwrap_or_default();
    match (word(), word(), word(), word()) {
        ("say", chat, name, text) if chat.parse::<i64>().is_ok() && !name.is_empty() => {
            api.person_writes(chat.parse().unwrap(), name, text);
        }
        ("unknown", chat, "", "") => api.unknown_chat(chat),
        ("block", chat, "", "") => api.block_chat(chat),
        ("hang", "", ..) => api.fail(every(""), Fault::Hang),
        ("portal", "", ..) => api.fail(every(""), Fault::Page(404)),
        ("heal", "", ..) => api.heal(),
        _ => eprintln!("not understood: {line}"),
    }
}

fn describe(call: &Call) -> String {
    json!({"method": call.method, "status": call.status, "connection": call.connection, "body": call.body}).to_string()
}

/// Prints a line at once; ends the program quietly when nobody reads any more.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        process::exit(0);
    }
}
