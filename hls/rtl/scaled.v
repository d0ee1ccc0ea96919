// sum * scale * step as a fixed-point number with 48 fraction bits, exactly: the widest case, sum * 2047**2 * 2**58,
// fits, so nothing is ever rounded or cut off here.
//
// Latency: 5 cycles (float16 product, two for the wide product so that it fills a DSP block's registers, two for the
// shift); `sum` is wanted one cycle after `scale` and `step`.
module scaled #(
    parameter SUM_WIDTH = 17,
    parameter WIDTH     = SUM_WIDTH + 80   // 22 bits of mantissas and 58 of shift
) (
    input  wire                        clk,
    input  wire [15:0]                 scale,
    input  wire [15:0]                 step,
    input  wire signed [SUM_WIDTH-1:0] sum,
    output reg  signed [WIDTH-1:0]     term,
    output wire                        special
);
    localparam P = SUM_WIDTH + 22;
    wire signed [22:0] mantissa;
    wire [5:0] shift;
    wire is_special;
    half_product pair (.clk(clk), .a(scale), .b(step), .mantissa(mantissa), .shift(shift), .special(is_special));

    reg signed [P-1:0] product, product_q;
    reg [5:0] shift_p, shift_q;
    reg signed [WIDTH-1:0] fine;
    reg [1:0] coarse;
    always @(posedge clk) begin
        product   <= sum * mantissa;
        product_q <= product;
        shift_p   <= shift;
        shift_q   <= shift_p;
        // Four bits here and two there: each is two levels of 4-to-1 choices or one, and a LUT6 is one such choice.
        fine      <= $signed({{(WIDTH - P){product_q[P-1]}}, product_q}) <<< shift_q[3:0];
        coarse    <= shift_q[5:4];
        term      <= fine <<< {coarse, 4'd0};
    end
    delay #(.WIDTH(1), .CYCLES(4)) flag (.clk(clk), .d(is_special), .q(special));
endmodule
