//! The tab of packets that ended in the data path, by reason.

use forwarder_common::abi::reason::DESCRIPTIONS;
use ratatui::layout::HorizontalAlignment::{Left, Right};

use super::{
    history::{History, Trend, ends},
    sheet::{Entry, Sheet, plain, quiet_zero},
};
use crate::{cli::status::rate, status::Status};

pub(super) fn sheet(status: &Status, history: &History) -> Sheet {
    let reasons = status
        .reasons
        .iter()
        .filter(|reason| ends(&reason.verdict) && reason.packets > 0);
    let rows = reasons.map(|reason| {
        let trend = Trend::Reason(reason.name.clone());
        // An agent of another version may know reasons that this program does not.
        let known = DESCRIPTIONS.iter().find(|known| known.name == reason.name);
        let mut detail = Vec::new();
        if let Some(known) = known {
            detail.push(known.text.to_owned());
            if !known.hint.is_empty() {
                detail.push(format!("hint: {}", known.hint));
            }
        }
        Entry {
            cells: vec![
                plain(&reason.name),
                plain(&reason.verdict),
                plain(reason.packets.to_string()),
                quiet_zero(rate(history.rate(&trend))),
                plain(reason.bytes.to_string()),
            ],
            trend,
            detail,
        }
    });
    Sheet {
        columns: vec![
            ("REASON", Left),
            ("VERDICT", Left),
            ("PACKETS", Right),
            ("PER S", Right),
            ("BYTES", Right),
        ],
        rows: rows.collect(),
        empty: "nothing was dropped or refused",
    }
}
