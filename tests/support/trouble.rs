//! The ways in which Telegram and the network fail, in words for the tables of the tests.

use std::time::Duration;

use super::{BotApi, Certificate, ConnectionFault, Fault, every};

impl BotApi {
    /// Every call fails from now on, in the way that these words name.
    pub fn fail_with(&self, words: &str) {
        let (kind, rest) = words.split_once(' ').unwrap_or((words, ""));
        let fault = match kind {
            "error" | "answer" | "page" => {
                let (status, text) = rest.split_once(' ').unwrap_or((rest, ""));
                let status = status.parse().expect("an HTTP status");
                match kind {
                    "error" => Fault::error(status, text),
                    "answer" => Fault::Answer(status, text.to_string()),
                    _ => Fault::Page(status),
                }
            }
            "flood" => Fault::too_many_requests(rest.parse().expect("seconds")),
            "conflict" => Fault::conflict(),
            "hang" => Fault::Hang,
            "close" => Fault::CloseUnanswered,
            "late" => Fault::Late(Duration::from_secs(1)),
            "drip" => Fault::Trickle(Duration::from_millis(200)),
            "endless" => Fault::Giant(16 << 20),
            "webhook" => return self.set_webhook(true),
            "refuse" => return self.refuse(),
            "handshake" => {
                self.fail_connections(usize::MAX, ConnectionFault::Hang);
                return self.close_connections();
            }
            "certificate" => {
                self.show(match rest {
                    "of another authority" => Certificate::OtherAuthority,
                    "of another name" => Certificate::WrongName,
                    "expired" => Certificate::Expired,
                    _ => panic!("no such certificate: {rest}"),
                });
                return self.close_connections();
            }
            _ => panic!("no such trouble: {words}"),
        };
        self.fail(every(""), fault);
    }
}
