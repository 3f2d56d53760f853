-- Append a batch of events of one process. Idempotent on (process, seq).
--
-- The events come as lines of one argument, for an argument each costs both sides more than the rest:
-- JSON has no line breaks of its own.
--
-- KEYS  1 log (stream)   2 seqs (hash: process -> last seq, or "lost")
-- ARGV  1 process   2 seq of the first event   3 number of events   4 events, a line each
-- Answer  {last seq now in the log, how many were new}
-- Errors  SEQGAP <expected>   the batch starts beyond the next seq; nothing is written
--         FENCED              the process was declared lost; nothing is written
local known = redis.call('HGET', KEYS[2], ARGV[1])
if known == 'lost' then return redis.error_reply('FENCED') end
local last = tonumber(known or '0')
local first, count = tonumber(ARGV[2]), tonumber(ARGV[3])
if first > last + 1 then return redis.error_reply('SEQGAP ' .. (last + 1)) end
local seen = last + 1 - first
if seen >= count then
  -- A write, though it changes nothing: WAIT and WAITAOF speak of the last write of the connection.
  if known then redis.call('HSET', KEYS[2], ARGV[1], known) end
  return {last, 0}
end
local call, find, sub, log, lines = redis.call, string.find, string.sub, KEYS[1], ARGV[4]
local start = 1
for number = 1, count do
  local stop = find(lines, '\n', start, true) or #lines + 1
  if number > seen then call('XADD', log, '*', 'e', sub(lines, start, stop - 1)) end
  start = stop + 1
end
last = first + count - 1
call('HSET', KEYS[2], ARGV[1], last)
return {last, count - seen}
