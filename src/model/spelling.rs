//! What somebody probably meant.

/// The one of `known` that `given` was probably meant to be.
#[must_use]
pub fn closest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let folded = given.to_lowercase().replace('-', "_");
    // Comparing a text of any length with every key would cost its square.
    if folded.len() > 64 {
        return None;
    }
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&folded, &candidate.to_lowercase()), candidate))
        .filter(|&(distance, candidate)| {
            distance <= candidate.chars().count().max(folded.chars().count()) / 3
        })
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closest_finds_typos_and_not_everything() {
        let known = ["instances", "interpreter", "name", "env"];
        assert_eq!(closest("instnaces", known), Some("instances"));
        assert_eq!(closest("Intepreter", known), Some("interpreter"));
        assert_eq!(closest("colour", known), None);
        assert_eq!(closest(&"x".repeat(10_000), known), None);
    }
}
