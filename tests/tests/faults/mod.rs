//! The parts of `netns_faults`: the site, the faults and who plays them, and who watches the agent.

pub(crate) mod script;
pub(crate) mod site;
pub(crate) mod watch;
